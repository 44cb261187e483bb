"""The synthetic tasks of MAD (Poli et al., arXiv 2403.17844), for any attention of the project."""

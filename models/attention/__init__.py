"""Attention modules behind the contract of base.py, one file per family; none imports another.

attention.kind in a config                         module
softmax                                            softmax.py
parallax                                           parallax.py
lla                                                local_linear.py
value-average, linear, affine-linear,              affine.py
affine-mesanet
gated-deltanet, kda                                delta_net.py
mesanet                                            mesa_net.py
mamba2                                             mamba2.py

key_values.py has the KV cache of the first three, recurrent/ the recurrences of the last four.
"""

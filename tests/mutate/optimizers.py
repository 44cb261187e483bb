"""Mutants of optimizers/."""

from tests.mutate.mutant import Mutant

DISTRIBUTED = "tests/optimizers/test_distributed.py"
EVERY = "tests/optimizers/test_every_optimizer.py"
EXCHANGE = "tests/optimizers/test_exchange.py"
HYPERBALL = "tests/optimizers/test_hyperball.py"
GROUPS = "tests/optimizers/test_param_groups.py"
MUON = "tests/optimizers/test_muon.py"
ORTHOGONALIZE = "tests/optimizers/test_orthogonalize.py"
SCHEDULE = "tests/optimizers/test_schedule.py"
SOAP = "tests/optimizers/test_soap.py"
SKIPPED = "tests/optimizers/test_skipped_step.py"
TITAN = "tests/optimizers/test_titan.py"

MUTANTS = [
    Mutant(
        "optimizers/orthogonalize.py",
        "(3.285753657755655, -2.3681294933425376, 0.46449024233003106)",
        "(3.285753657755655, -2.3681294933425376, 0.56449024233003106)",
        ORTHOGONALIZE,
    ),
    Mutant(
        "optimizers/orthogonalize.py",
        "torch.promote_types(batch.dtype, torch.float32)",
        "batch.dtype",
        ORTHOGONALIZE,
    ),
    Mutant("optimizers/orthogonalize.py", "MAX_GROWTH = 50.0", "MAX_GROWTH = 1e9", ORTHOGONALIZE),
    Mutant(
        "optimizers/orthogonalize.py",
        "0.0 if x.dtype == torch.bfloat16 else MAX_GROWTH",
        "MAX_GROWTH",
        ORTHOGONALIZE,
    ),
    Mutant("optimizers/orthogonalize.py", ".clamp(min=eps)", "", ORTHOGONALIZE),
    Mutant(
        "optimizers/exchange.py",
        "layout.row_chunks[senders].argsort())",
        "layout.row_chunks[senders])",
        EXCHANGE,
    ),
    Mutant(
        "optimizers/exchange.py",
        "size = -(-len(span) // self.mesh.shape[d])",
        "size = len(span) // self.mesh.shape[d]",
        EXCHANGE,
    ),
    Mutant(
        "optimizers/buckets.py",
        "            load[owner] += _cost(layout.shape)\n",
        "            load[owner] += 1\n",
        EXCHANGE,
    ),
    Mutant("optimizers/buckets.py", "key=lambda item: -_cost(", "key=lambda item: _cost(", EXCHANGE),
    Mutant("optimizers/muon.py", 'weight=1.0 - group["momentum"]', 'weight=group["momentum"]', MUON),
    Mutant(
        "optimizers/muon.py",
        "new_means = torch.where(self.found_inf != 0, torch.stack(means), new_means)",
        "pass",
        MUON,
    ),
    Mutant(
        "optimizers/muon.py",
        "updates / (new_means.sqrt() + 1e-8)",
        "updates / (new_means.sqrt() + 1e-2)",
        MUON,
    ),
    Mutant(
        "optimizers/orthogonalized.py",
        'SCALES[group["scale"]](*_block_shape(bucket, group))',
        'SCALES[group["scale"]](*bucket.layout.shape)',
        MUON,
    ),
    Mutant("optimizers/muon.py", "if bucket.layout.num_ranks > 1:", "if False:", DISTRIBUTED),
    Mutant("optimizers/orthogonalized.py", "        self._sampled_blocks.clear()\n", "", MUON),
    Mutant("optimizers/orthogonalized.py", "            self.param_groups.pop()\n", "", MUON),
    Mutant(
        "optimizers/param_groups.py",
        "any(p.fullmatch(name) for p in own)",
        "any(p.match(name) for p in own)",
        GROUPS,
    ),
    Mutant(
        "optimizers/param_groups.py",
        "        if not parameter.requires_grad:\n            continue\n",
        "",
        GROUPS,
    ),
    Mutant(
        "optimizers/schedule.py",
        "return round(total_steps * ratio)",
        "return int(total_steps * ratio)",
        SCHEDULE,
    ),
    Mutant(
        "optimizers/schedule.py",
        "return max(total_steps - config.warmup_steps, 0)",
        "return total_steps - config.warmup_steps",
        SCHEDULE,
    ),
    Mutant(
        "optimizers/schedule.py",
        "return (step + 1) / config.warmup_steps",
        "return step / config.warmup_steps",
        SCHEDULE,
    ),
    Mutant("optimizers/adamw.py", "(1.0 - beta1**num_steps).square()", "(1.0 - beta1**num_steps)", SKIPPED),
    Mutant("optimizers/adamw.py", "torch.where(self.found_inf != 0, 0.0, total)", "total", SKIPPED),
    Mutant(
        "optimizers/update_size.py",
        "torch.where(has_moved, squared_norm, 0.0)",
        "squared_norm",
        EVERY,
    ),
    Mutant("optimizers/orthogonalized.py", "torch.where(self.found_inf != 0, 0.0, value)", "value", EVERY),
    Mutant(
        "optimizers/titan.py",
        "            optimizer.found_inf = None\n",
        "",
        SKIPPED,
    ),
    Mutant("optimizers/base.py", "if self.found_inf is not None:", "if False:", EVERY),
    Mutant("optimizers/build.py", "if not optimizer.state[p]:", "if True:", EVERY),
    Mutant("optimizers/update_size.py", ".sum() / num_replicas(p)", ".sum()", EVERY),
    Mutant("optimizers/titan.py", "        if differing:\n", "        if False:\n", TITAN),
    Mutant(
        "optimizers/orthogonalized.py",
        "            squared_norm /= num_replicas(bucket.params[0])\n",
        "",
        SKIPPED,
    ),
    Mutant(
        "optimizers/titan.py",
        'group["weight_decay"] = group["base_weight_decay"] * decay_factor',
        'group["weight_decay"] = group["weight_decay"] * decay_factor',
        TITAN,
    ),
    Mutant(
        "optimizers/titan.py",
        '        self._step = int(state_dict["step"])\n        self._apply()\n',
        '        self._step = int(state_dict["step"])\n',
        f"{TITAN} {SCHEDULE}",
    ),
    Mutant("optimizers/schedule.py", "decay_ratio=None, decay_steps=None)", "decay_steps=None)", SCHEDULE),
    Mutant("optimizers/hyperball.py", "(weight == 0.0) | (change == 0.0)", "weight == 0.0", HYPERBALL),
    Mutant("optimizers/hyperball.py", "(weight == 0.0) | (change == 0.0)", "change == 0.0", HYPERBALL),
    Mutant("optimizers/hyperball.py", "- 2.0 * length * product", "", HYPERBALL),
    Mutant("optimizers/hyperball.py", "    if layout.num_ranks > 1:\n", "    if False:\n", HYPERBALL),
    Mutant("optimizers/soap.py", ".take_along_dim(order, -1 if transposed else -2)", "", SOAP),
    Mutant("optimizers/soap.py", "beta2**num_steps", "beta2 ** (num_steps + 1)", SOAP),
    Mutant("optimizers/soap.py", "first = sum(num_owned[:rank])", "first = sum(num_owned[1:rank])", SOAP),
    Mutant("optimizers/soap.py", "if len(set(steps)) == 1:", "if True:", SOAP),
    Mutant("optimizers/soap.py", 'self.state[p]["step"]) > 1', 'self.state[p]["step"]) > 0', SOAP),
    Mutant("optimizers/eigenbasis.py", "(outside < 1e-6)", "(outside < 0.0)", SOAP),
    Mutant("optimizers/eigenbasis.py", "torch.where(is_null, standard[:, order], vectors)", "vectors", SOAP),
    Mutant("optimizers/eigenbasis.py", "(True, False, False)", "(True, False)", SOAP),
    Mutant("optimizers/eigenbasis.py", "add_(shift.unsqueeze(-1))", "add_(0.0)", SOAP),
    Mutant("optimizers/eigenbasis.py", "block - before @ (before.mT @ block)", "block", SOAP),
    Mutant("optimizers/eigenbasis.py", "if is_lost.any()", "if False", SOAP),
    Mutant("optimizers/eigenbasis.py", "float64, copy=True", "float64", SOAP),
]

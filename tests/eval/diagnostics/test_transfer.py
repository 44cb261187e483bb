"""Many tensors copied to the host at once."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.diagnostics.transfer import to_host


def test_tensors_of_several_shapes_and_dtypes_come_back_as_they_were() -> None:
    tables = [
        {"bytes": torch.arange(3, dtype=torch.uint8), "scalar": torch.tensor(2.5)},
        {},
        {
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            "half": torch.arange(5).to(torch.bfloat16),
            "wide": torch.tensor([[0.1, float("nan")]], dtype=torch.float64),
            "none": torch.empty(0, 4),
        },
    ]
    found = to_host(tables)
    assert [list(table) for table in found] == [list(table) for table in tables]
    for ours, theirs in zip(tables, found, strict=True):
        for name, x in ours.items():
            assert theirs[name].dtype == x.dtype
            torch.testing.assert_close(theirs[name], x, rtol=0, atol=0, equal_nan=True)
    assert to_host([]) == []
    assert to_host([{}]) == [{}]


def test_one_copy_leaves_the_device() -> None:
    sources: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyrefly: ignore
            if func is torch.ops.aten.cat.default:
                (tensors,) = args[:1]
                sources.append(len(tensors))
            return func(*args, **(kwargs or {}))

    with Watch():
        to_host([{"a": torch.ones(2), "b": torch.ones(2).double()}, {"a": torch.ones(3)}])
    assert sources == [3]

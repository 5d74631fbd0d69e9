"""Runs the Triton scan under Triton's interpreter, on torch CPU tensors, and checks it.

A program of its own, for the interpreter is chosen when a kernel's module is imported:

    TRITON_INTERPRET=1 python triton_on_cpu.py CASE ...

Prints one line of JSON a case: the errors of `gpu_cases.errors`, or `gpu_goldens.excess`.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton.runtime.interpreter as interpreter

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import CASES, TILE, errors
from gpu_goldens import excess

from zzhnet_jax.kernels.selective_scan.triton_gpu import triton_scan


def scan_by_rows(self, tensors):
    """What the interpreter does value by value in Python, on whole rows: 100 times as fast."""
    rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in tensors]
    total, done = None, []
    for k in range(len(rows[0])):
        row = [self.to_tensor(x[k], t.dtype) for x, t in zip(rows, tensors, strict=True)]
        total = row if total is None else self.combine_fn.fn(*total, *row)
        done.append([x.handle.data for x in total])
    stacked = (np.stack(x, self.axis) for x in zip(*done, strict=True))
    return [self.to_tensor(x, t.dtype) for x, t in zip(stacked, tensors, strict=True)]


def to_torch(x):
    x = np.array(x)
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x, dtype):
    return x.view(torch.int16).numpy().view(dtype) if dtype == jnp.bfloat16 else x.numpy()


def run_on_cpu(launch, *inputs):
    """Runs a kernel as `run_on_gpu` does, by calling back from JAX."""

    def call(*inputs):
        nan = [np.full(x.shape, np.nan, x.dtype) for x in launch.outputs]
        arrays = [to_torch(x) for x in (*inputs, *nan)]
        launch.kernel[launch.grid](*arrays, **launch.constants)
        results = zip(arrays[len(inputs) :], launch.outputs, strict=True)
        return tuple(to_numpy(x, out.dtype) for x, out in results)

    return jax.pure_callback(call, launch.outputs, *inputs)


def main(names):
    interpreter.ScanOps.generic_scan = scan_by_rows
    for name in names:
        if name in CASES:
            found = errors(triton_scan, CASES[name], tile=TILE, interpret=run_on_cpu)
        else:
            found = excess(triton_scan, name, interpret=run_on_cpu)
        print(json.dumps({"case": name, "errors": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

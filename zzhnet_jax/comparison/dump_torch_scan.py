"""Records what PyTorch's selective scan computes, for `zzhnet compare-scans --from-torch`.

    python dump_torch_scan.py scans.npz

Copy this file to a machine with a GPU and run it there: it needs PyTorch and one of

    mamba_ssm                     (pip install mamba-ssm)
    selective_scan_cuda_oflex     VMamba's extension, kernels/selective_scan of its repository
    selective_scan_cuda_core      its older form

and nothing of zzhnet_jax. `--kernel loop` needs none of them and no GPU: it runs the recurrence
step by step with PyTorch's own operations.

The file holds, for every scan k, `k/in/NAME` (u, delta (b, l, d); A (d, n); B, C (b, l, g, n); D,
delta_bias (d,)), `k/cot` (b, l, d), `k/out/y`, `k/grad/NAME` (gradients of sum(y * cot)), and in
`meta`, a JSON string, how they were made. Halves are stored as float32, which holds them exactly.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

FORMAT = "zzhnet selective scans 1"
# batch, length, channels, d_state, groups: the stages of VMamba-T at 256x256, and Mamba's layer.
STAGES = ("1,4096,768,1,4", "1,1024,1536,1,4", "1,256,3072,1,4", "1,64,6144,1,4")
SHAPES = (*STAGES, "1,2048,1536,16,1")
SEQUENCES = ("u", "delta", "B", "C")


def draw(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arguments with the statistics of a freshly initialised network, and a cotangent."""
    b, length, d, n, g = shape
    rng = np.random.default_rng(0)
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), d))
    return {
        "u": rng.standard_normal((b, length, d)),
        "delta": 0.5 * rng.standard_normal((b, length, d)),
        "A": -np.tile(np.arange(1.0, n + 1), (d, 1)),
        "B": rng.standard_normal((b, length, g, n)),
        "C": rng.standard_normal((b, length, g, n)),
        "D": np.ones(d),
        "delta_bias": np.log(np.expm1(step)),
        "cot": rng.standard_normal((b, length, d)),
    }


def loop(torch: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any) -> Any:
    """The recurrence, one step after another; arguments as the kernels take them, length last."""
    step = torch.nn.functional.softplus(delta.float() + bias[:, None])
    channels = u.shape[1] // B.shape[1]
    state = torch.zeros(u.shape[0], *A.shape, device=u.device)
    rows = []
    for t in range(u.shape[2]):
        B_t, C_t = (x[..., t].float().repeat_interleave(channels, dim=1) for x in (B, C))
        decay = torch.exp(step[:, :, t, None] * A)
        state = decay * state + (step[:, :, t] * u[:, :, t].float())[..., None] * B_t
        rows.append((state * C_t).sum(-1))
    y = torch.stack(rows, dim=2) + D[:, None] * u.float()
    return y.to(u.dtype)


def vmamba(torch: Any, module: Any) -> Any:
    """VMamba's extension, which comes as two functions, as one that PyTorch differentiates."""
    extra = (True,) if module.__name__.endswith("oflex") else ()  # keep y in float32

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any) -> Any:
            y, kept, *_ = module.fwd(u, delta, A, B, C, D, bias, True, 1, *extra)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, kept)
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            *arguments, kept = ctx.saved_tensors
            return tuple(module.bwd(*arguments, gradient.contiguous(), kept, True, 1)[:7])

    return Scan.apply


def find_kernel(torch: Any, wanted: str | None) -> tuple[str, Any]:
    """Name and function of a kernel that can be imported.

    Raises:
      SystemExit: there is none.
    """
    reasons = []
    for name in (wanted,) if wanted else KERNELS[:-1]:
        try:
            if name == "loop":
                return name, lambda *arguments: loop(torch, *arguments)
            if name == "mamba_ssm":
                from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

                return name, lambda u, delta, A, B, C, D, bias: selective_scan_fn(
                    *(u, delta, A, B, C, D), delta_bias=bias, delta_softplus=True
                )
            return name, vmamba(torch, __import__(name))
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise SystemExit("error: no kernel can be imported; " + "; ".join(reasons))


KERNELS = ("mamba_ssm", "selective_scan_cuda_oflex", "selective_scan_cuda_core", "loop")


def record(
    torch: Any, scan: Any, shape: tuple[int, ...], dtype: str, device: str, repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of one scan under their names in the file, and what else the file says of it."""
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    given = {}
    for name, array in draw(shape).items():
        kind = getattr(torch, dtype) if name in (*SEQUENCES, "cot") else torch.float32
        given[name] = torch.from_numpy(np.ascontiguousarray(array)).to(device, kind)

    def length_last(x: Any) -> Any:
        return x.movedim(1, -1).contiguous()

    tensors = {k: length_last(given[k]) if k in SEQUENCES else given[k] for k in names}
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    cotangent = length_last(given["cot"])

    def forward() -> Any:
        return scan(*tensors.values())

    def gradient() -> Any:
        y = forward()
        return torch.autograd.grad(y, list(tensors.values()), cotangent.to(y.dtype))

    def milliseconds(function: Any) -> float:
        times = []
        for _ in range(repeats + 1):  # the first run warms up
            _wait(torch, device)
            start = time.perf_counter()
            function()
            _wait(torch, device)
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times[1:]))

    arrays = {f"in/{name}": given[name] for name in names} | {"cot": given["cot"]}
    y = forward()
    arrays["out/y"] = y.movedim(-1, 1)
    for name, x in zip(names, gradient(), strict=True):
        arrays[f"grad/{name}"] = x.movedim(-1, 1) if name in SEQUENCES else x
    with torch.no_grad():
        times = {"forward": milliseconds(forward)}
    times["gradient"] = milliseconds(gradient)
    facts = {"shape": shape, "dtype": dtype, "y_dtype": str(y.dtype)[6:], "milliseconds": times}
    return {k: x.detach().float().cpu().numpy() for k, x in arrays.items()}, facts


def _wait(torch: Any, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Runs the scans and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", help="file to write, ending in .npz")
    parser.add_argument("--kernel", choices=KERNELS, help="the first that can be imported")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="b,l,d,n,g")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--device", default=None, help="cuda; cpu with --kernel loop")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    import torch

    name, scan = find_kernel(torch, options.kernel)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    arrays: dict[str, np.ndarray] = {}
    scans: list[dict[str, Any]] = []
    for text in options.shapes:
        shape = tuple(int(part) for part in text.split(","))
        for dtype in options.dtypes:
            found, facts = record(torch, scan, shape, dtype, device, options.repeats)
            arrays |= {f"{len(scans)}/{key}": x for key, x in found.items()}
            scans.append(facts)
            times = facts["milliseconds"]
            print(f"{text} {dtype}: forward {times['forward']:.3f} ms,", end=" ")
            print(f"gradient {times['gradient']:.3f} ms", flush=True)
    meta = {"format": FORMAT, "kernel": name, "torch": torch.__version__, "device": where}
    arrays["meta"] = np.array(json.dumps(meta | {"scans": scans}))
    np.savez_compressed(options.file, allow_pickle=False, **arrays)
    print(f"wrote {options.file}: {name} on {where}")


if __name__ == "__main__":
    main()

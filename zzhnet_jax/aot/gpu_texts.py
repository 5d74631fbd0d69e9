"""What XLA's GPU compiler must know about a GPU that is not there, in its own text format.

The figures are the limits of the CUDA programming guide for each compute capability, and the clock,
memory and core counts of NVIDIA's datasheets.
"""


def _gpu_text(
    name: str,
    *,
    major: int,
    cores: int,
    shared_memory: int,
    memory_rate: int,
    memory: int,
    l2_cache: int,
    gigahertz: float,
) -> str:
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory - 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_rate}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {gigahertz}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


GPU_TEXTS = {
    "a100": _gpu_text(
        "NVIDIA A100-SXM4-80GB",
        major=8,
        cores=108,
        shared_memory=164 * 1024,
        memory_rate=2_039_000_000_000,
        memory=85_024_112_640,
        l2_cache=40 * 2**20,
        gigahertz=1.41,
    ),
    "h100": _gpu_text(
        "NVIDIA H100 80GB HBM3",
        major=9,
        cores=132,
        shared_memory=228 * 1024,
        memory_rate=3_352_320_000_000,
        memory=84_929_347_584,
        l2_cache=50 * 2**20,
        gigahertz=1.98,
    ),
    "b200": _gpu_text(
        "NVIDIA B200",
        major=10,
        cores=148,
        shared_memory=228 * 1024,
        memory_rate=7_700_000_000_000,
        memory=180_000_000_000,
        l2_cache=126 * 2**20,
        gigahertz=1.965,
    ),
}

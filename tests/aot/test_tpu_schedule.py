"""Reading the schedule that the TPU compiler dumps, from a shortened dump of its form."""

import pytest

from zzhnet_jax.aot.tpu_schedule import (
    Loop,
    ScheduleError,
    bundles_per_step,
    dump_flags,
    read_schedule,
)

ANALYSIS = """Schedule analysis:
\ttotal scheduled bundles:    11
\tempty scheduled bundles:    1
"""
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: f32[8,128], index: 0, kind: input] }
   0x1   :  { %13 = vsyncpa [#allocation8], 0 }
   0x2 LB: > { %s8 = sadd.s32 4294967295, %s9  ;;  %s10 = sphi %s11, %s12 }
   0x3   : > { %s8 = sadd.s32 1, %s9 }
   0x4 LB: >> { %v1 = vld [vmem:[#allocation2] sm:$0xff]  ;;  %v2 = vmul.f32 %v1, %v1 }
   0x5   : >> { %91 = vst [vmem:[#allocation9_spill] sm:$0xff] /*vst_source=*/%v2 }
   0x6   : >> { %v3 = vld [vmem:[#allocation9_spill]] }
  0x6a   : >> { %p1 = scmp.ge.s32.totalorder %s1, 4 /* loop exit test */ }
   0x7 PF: > { %20 = sst [smem:[#allocation3_spill]] %s8 }
   0x8 LB: >> { %v4 = vld [vmem:[#allocation2] sm:$0xff] }
   0x9   : >> { %p2_p0 = scmp.ge.s32.totalorder %s2, 6 /* loop exit test */ }
  0x9a   : >> { %p3 = scmp.ge.s32.totalorder (%p2_p0), %s8, 130 /* loop exit test */ }
   0xa   :  { %21 = vsyncpa [#allocation8], 1 }
"""


@pytest.fixture
def dump(tmp_path):
    """Two compilations of a kernel, the first with another count."""
    for time, total in (("100", "7"), ("200", "11")):
        analysis = tmp_path / f"{time}-scan_forward.1-71-schedule-analysis_final_bundles.txt"
        analysis.write_text(ANALYSIS.replace("11", total))
        (tmp_path / f"{time}-scan_forward.1-72-final_bundles.txt").write_text(BUNDLES)
    return tmp_path


def test_reads_the_last_schedule(dump):
    schedule = read_schedule(dump, "scan_forward")
    assert schedule.bundles == 11
    assert schedule.loops == (
        Loop(depth=1, trips=130, bundles=3, spills=0, innermost=False),
        Loop(depth=2, trips=4, bundles=4, spills=2, innermost=True),
        Loop(depth=2, trips=6, bundles=3, spills=0, innermost=True),
    )
    assert schedule.innermost == (4, 3)
    assert schedule.inner_bundles == 4 * 4 + 6 * 3
    assert schedule.outer_bundles == 3


def test_bundles_per_step(dump):
    schedule = read_schedule(dump, "scan_forward")
    assert bundles_per_step(schedule, steps=24, tiles=2) == 37 / 48
    assert bundles_per_step(schedule, steps=24, tiles=2, inner=True) == 34 / 48


def test_unknown_limit(dump):
    for path in dump.glob("*-72-*"):
        path.write_text(BUNDLES.replace(", 4 /*", ", %s3 /*"))
    with pytest.raises(ScheduleError, match="without a constant limit"):
        read_schedule(dump, "scan_forward")


RAGGED_BLOCK = """
   0x1 LB: > { %s9 = sphi %s11, %s12 }
   0x2   : > { %s4229_s20 = ssub.s32 (%p7452_p11), 125, %s7665_s13 }
   0x3   : > { %s10877_s20 = smov (!%p4230_p3, %s4229_s20), 24 }
   0x4   : > { %s10435_s16 = sshrl.u32 (!%p6263_p12), %s10877_s20, 4 }
   0x5 LB: >> { %v1 = vld [vmem:[%s72] sm:$0xff]  ;;  %s29 = sadd.s32 1, %s22 }
   0x6   : >> { %p68 = scmp.ge.s32.totalorder %s67_s4, %s66  ;;  %s5 = sadd.s32 8, %s4 }
   0x7   : >> { %p28 = scmp.ge.s32.totalorder %s29, %s10435_s16 }
   0x8 PF: > { %s10508_s22 = sand.u32 15, %s10877_s20 /* smod.u32 w/div 16 */ }
   0x9 LB: >> { %p83 = scmp.ge.s32.totalorder %s84, %s10508_s22 }
   0xa   : >> { %4386 = sbr.rel (!%p83) target = $region707 }
   0xb   : > { %p37 = scmp.ge.s32.totalorder %s40, 18 /* loop exit test */ }
"""


def test_counts_loops_that_copy_a_block_that_hangs_over(dump):
    """The compiler's own: their limits are computed, at most 24 >> 4 and 15 times."""
    for path in dump.glob("*-72-*"):
        path.write_text(RAGGED_BLOCK)
    assert read_schedule(dump, "scan_forward").loops == (
        Loop(depth=1, trips=18, bundles=6, spills=0, innermost=False),
        Loop(depth=2, trips=1, bundles=3, spills=0, innermost=True),
        Loop(depth=2, trips=15, bundles=2, spills=0, innermost=True),
    )


def test_no_schedule(dump):
    with pytest.raises(ScheduleError, match="no final schedule of a kernel 'scan'"):
        read_schedule(dump, "scan")


def test_flags_name_the_folder(tmp_path):
    assert f"--xla_jf_dump_to={tmp_path} " in dump_flags(tmp_path)

"""Counting issued bundles: the compiler's dumps and modules in small."""

import subprocess
import sys

import pytest

from benchmarks import tpu_bundles

PROGRAM = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: f32[8]] }
   0x1   :  { %s2 = smov.u32 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s4 /* phi copy */ }
   0x3   :  {}
   0x4 PF: > { %s5 = dma.general (%p0)
window_bounds: (1, 13)
 */ }
{inner}   0x5   : > { %p1 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */ }
   0x6   : > { %s6 = smov.u32 1 /* copy for cssa */ }
   0x7   :  { %9 = sbr.rel (!%p1) target = $region2 }
   0x8   : > { %s7 = smov.u32 1 }
   0x9   :  {} /* End region 3 */
"""
INNER = """   0xa LB: >> { %s8 = sadd.s32 1, %s8 }
   0xb   : >> { %p2 = scmp.ge.s32.totalorder %s8, 4 /* loop exit test */ }
"""
MODULE = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_a (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %exp.1 = f32[8]{0} exponential(%param_0), metadata={op_name="jit(f)/exp" stack_frame_id=1}
}

%fused_b (param_0.1: f32[8]) -> f32[8] {
  %param_0.1 = f32[8]{0} parameter(0)
  ROOT %exp.2 = f32[8]{0} exponential(%param_0.1)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} copy(%arg), backend_config={"flag_configs":[]}
  ROOT %fusion.1 = f32[8]{0} fusion(%arg), kind=kLoop, calls=%fused_a, backend_config={"window_config":{"a":1}}
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%arg.1, %constant.1), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body
  %fusion.2 = f32[8]{0} fusion(%while.1), kind=kLoop, calls=%fused_b, backend_config={"window_config":{"a":1}}
  ROOT %kernel.3 = f32[8]{0} custom-call(%fusion.2), custom_call_target="tpu_custom_call"
}
"""


def program(inner=""):
    return PROGRAM.replace("{inner}", inner)


def test_a_bundle_counts_as_often_as_its_loop_is_run():
    before_and_behind, a_trip = 2 + 3, 5
    assert tpu_bundles.issued(program()) == before_and_behind + 10 * a_trip
    assert tpu_bundles.issued(program(INNER)) == before_and_behind + 10 * (a_trip + 4 * 2)


def test_a_loop_that_does_not_say_how_often_it_is_run_counts_once_within_another_and_is_refused_elsewhere():
    assert tpu_bundles.issued(program(INNER.replace("loop exit test", ""))) == 2 + 3 + 10 * (5 + 2)
    with pytest.raises(ValueError, match="how often"):
        tpu_bundles.issued(program().replace("loop exit test", ""))


def test_programs_count_as_often_as_the_scan_around_them_and_the_same_ones_are_known_by_one_dump(tmp_path):
    (tmp_path / "123-fusion.1-66-final_bundles.txt").write_text("     0   :  { %a }\n   0x1   :  { %b }\n")
    (tmp_path / "124-kernel.3-72-final_bundles.txt").write_text(program())
    (tmp_path / "124-kernel.3-71-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles:    9\n")
    assert tpu_bundles.total(MODULE, tmp_path) == {"fusion.1": 7 * 2, "fusion.2": 2, "kernel.3": 55}


def test_a_program_without_a_dump_and_a_scan_without_a_length_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no bundles of fusion.1, fusion.2, kernel.3"):
        tpu_bundles.total(MODULE, tmp_path)
    with pytest.raises(ValueError, match="no constant number of trips in condition"):
        tpu_bundles.executions(MODULE.replace("constant(7)", "parameter(1)"))


def test_without_the_compiler_it_says_what_is_missing(root):
    hidden = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a)"
    code = f"{hidden}; from benchmarks.tpu_bundles import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install libtpu" in done.stderr

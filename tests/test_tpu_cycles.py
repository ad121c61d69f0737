"""The tool that reads a TPU's cycles from what its compiler writes down."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import tpu_cycles

SCHEDULE = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 /* iteration index, stage = 2 */ }
   0x2   : > { %v1 = vld [vmem:[%s2]] }
   0x3 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x4   : >> { %p2 = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
   0x5   : >> { %9 = sbr.rel (!%p2) target = $region4 }
   0x6   :  {}
hlo: fusion.1
   0x7   : > { %p1 = scmp.ge.s32.totalorder %s2, 10 /* loop exit test */ }
   0x8 LB: > { %v3 = vadd.f32 %v1, %v1 }
   0x9   :  { %8 = vsyncpa [#allocation1], 1 }
"""

PROGRAM = """HloModule m
%layers_condition (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %constant.1 = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%get-tuple-element.1, %constant.1), direction=LT
}

%other_condition (p: s32[]) -> pred[] {
  %constant.2 = s32[] constant(7)
  ROOT %and = pred[] and(%a, %constant.2)
}

%layers (p: s32[]) -> s32[] {
  ROOT %fusion.1 = s32[] fusion(%p), calls=%f
}

%steps (p: s32[]) -> s32[] {
  %sort.3 = s32[] sort(%p)
  ROOT %while.1 = s32[] while(%p), condition=%layers_condition, body=%layers
}

ENTRY %main (p: s32[]) -> s32[] {
  %copy.1 = s32[] copy(%p)
  ROOT %while.2 = s32[] while(%copy.1), condition=%other_condition, body=%steps
}
"""


def test_rounds_of_nested_loops():
    """Five rounds of four bundles, one of them a branch's delay slot, in eight of ten, two being the pipeline's; then a
    loop whose rounds are not in the code."""
    assert tpu_cycles.kernel_cycles(SCHEDULE, 3.0) == 1 + 8 * (2 + 5 * 4 + 1) + 3 + 1


def test_instructions_of_loops_count_as_often_as_they_run():
    assert tpu_cycles.executions(PROGRAM) == {"sort.3": 1.0, "while.1": 1.0, "fusion.1": 28.0}

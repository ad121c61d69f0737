"""What a worker does: math-verify's verdicts and the groups of equal answers, step by step.

`judge` and `group` are generators. Each step between two of their messages may be killed when it takes too long, so a
message is sent wherever work should not be lost or blamed on the next step. Messages are pairs (last, value).
math-verify's own time limits are off: they need SIGALRM and a running interpreter, which a huge power denies them.
"""

import cmath
import math
import re
import time
import zlib
from functools import lru_cache

import math_verify
import math_verify.grader
import math_verify.parser
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from sympy import (
    Add,
    Derivative,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Integer,
    Interval,
    Limit,
    MatrixBase,
    Rational,
    Set,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
    count_ops,
    latex,
)
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from sympy.matrices.expressions.matexpr import MatrixExpr
from sympy.parsing import sympy_parser

from rlvd_jax.grading.answers import rational

_SHORT = 1000  # characters; longer texts hardly ever come twice
_LEAVES = 64  # numbers in an answer; comparing more costs more than it saves
_PRECISION = 30  # bits of a number's 53 that tell enough


def parse(text: str) -> list:
    """What math-verify finds in `text`: an expression and the string it came from, or one of them, or nothing."""
    return _parse_short(text) if len(text) <= _SHORT else _parse(text)


def parse_answer(answer: str) -> list:
    """The same for an answer in a box."""
    value = rational(answer)
    if isinstance(value, int):  # exactly what math-verify makes of it
        return [Integer(value), answer]
    return parse(rf"\boxed{{{answer}}}")


def _parse(text: str) -> list:
    return math_verify.parse(text, parsing_timeout=None)


_parse_short = lru_cache(4096)(_parse)


def same_string(a: list, b: list) -> bool:
    """Whether math-verify found one and the same string in both: then its `verify` is true, whatever else it found."""
    strings = {x.strip() for x in a if isinstance(x, str)} - {""}
    return any(isinstance(x, str) and x.strip() in strings for x in b)


def verify(gold: list, target: list) -> bool:
    """`math_verify.verify` without its time limit, the comparison of strings first because it costs nothing."""
    return same_string(gold, target) or math_verify.verify(gold, target, timeout_seconds=None)


def correct(gold: list, target: list) -> bool:
    """`verify`, but for pairs whose numbers tell them apart, which are most of the wrong answers."""
    return same_string(gold, target) or (not differ(leaves(gold), leaves(target)) and verify(gold, target))


def equal(a: list, b: list) -> bool:
    """Whether `verify` is true in both orders.

    Tried first is the order that compares a relation as it stands: in the other it is solved for a set, or its right
    side alone counts.
    """

    def has(kind, found):
        return any(isinstance(x, kind) for x in found)

    if (has(Boolean, a) and has(Set, b)) or (has(Boolean, b) and not has(Set, a)):
        a, b = b, a
    return verify(a, b) and verify(b, a)


def judge(gold: str, text: str, has_box: bool):
    """Judge one answer: messages ("gold",), ("verdict", correct, reason) and, without a box, ("answer", found or None).

    Args:
      gold: the right answer, without a box.
      text: the inside of the response's box, or the whole response.
      has_box: which of them.
    """
    right = parse_answer(gold)
    yield False, ("gold",)
    found = parse_answer(text) if has_box else parse(text)
    yield has_box, ("verdict", *((correct(right, found), "ok") if right and found else (False, "unparsed")))
    if not has_box:
        yield True, ("answer", display(found))


def display(found: list) -> str | None:
    r"""What math-verify found in a text, as a string that reads the same in a box; None if it found nothing."""
    string = next((x.strip() for x in found if isinstance(x, str)), "")
    expressions = [x for x in found if not isinstance(x, str)]
    if not expressions:
        return string or None
    again = [x for x in parse_answer(string) if not isinstance(x, str)] if string else []
    if again and math_verify.verify(expressions, again, timeout_seconds=None):
        return string
    try:  # the string is of another match in the text than the expression, or reads otherwise in a box
        return latex(expressions[0])
    except Exception:
        return string or None


def group(answers: list[str], placed: list[int], broken: set[int], unequal: set[tuple[int, int]], budget: float):
    """Group equal answers.

    Each answer joins the first group whose representative (its first member) it equals, else it founds one. Two
    answers are equal if `verify` says so in both orders: `verify(1, 2x + z = 1)` is true, its converse is not.
    Messages: ("try", i, g, seconds) before answer i is compared with the representative of group g, or (g = -1)
    parsed; ("put", g, seconds) when the next answer has its group; ("done",). Seconds are of processor time, so far.

    Args:
      answers: distinct strings, the most frequent first.
      placed: the groups of the first of them, from an attempt before this one.
      broken: positions of answers that cannot be parsed in time; each is a group of its own.
      unequal: pairs (answer, group) whose comparison takes too long.
      budget: seconds of processor time left; answers that are not placed by then are groups of their own.
    """
    began = time.process_time()

    def spent():
        return time.process_time() - began

    leaders = {}  # group -> (parsed, leaves) of its representative, None if that can't be compared
    founders = {g: i for i, g in reversed([*enumerate(placed)])}

    def prepared(i):
        found = parse_answer(answers[i])
        return found, leaves(found)

    for g, i in sorted(founders.items()):
        leaders[g] = None
        if i not in broken and spent() < budget:
            yield False, ("try", i, -1, spent())
            leaders[g] = prepared(i)
    for i in range(len(placed), len(answers)):
        mine, home = None, None
        if i not in broken and spent() < budget:
            yield False, ("try", i, -1, spent())
            mine = prepared(i)
            for g, leader in leaders.items():
                if leader is None or (i, g) in unequal or spent() >= budget:
                    continue
                if same_string(leader[0], mine[0]):
                    home = g
                elif not differ(leader[1], mine[1]):
                    yield False, ("try", i, g, spent())
                    if equal(leader[0], mine[0]):
                        home = g
                if home is not None:
                    break
        if home is None:
            home = len(leaders)
            leaders[home] = mine
        yield False, ("put", home, spent())
    yield True, ("done",)


# Percentages (5% equals 5), and what takes long to evaluate.
_NO_NUMBER = (UnevaluatedExpr, ExprWithLimits, Limit, Derivative)


def leaves(found: list) -> tuple[complex, ...] | None:
    """The numbers that make up a parsed answer, symbols replaced by fixed numbers; None where they can't tell.

    They tell where `verify` compares by value: expressions, and tuples, finite sets, intervals (and their unions) and
    matrices of them. They don't for relations and lone symbols (compared by name).
    """
    try:
        numbers = _numbers(found)
        values = tuple(_as_complex(_at_fixed_point(x)) for x in numbers or ())
    except Exception:  # what sympy cannot take apart or evaluate
        return None
    return values if values and not any(map(cmath.isnan, values)) else None


def _numbers(found: list) -> list[Expr] | None:
    numbers = []
    todo = [x for x in found if not isinstance(x, str)]
    while todo:
        x = todo.pop()
        if isinstance(x, (Tuple, FiniteSet)):
            todo += x.args
        elif isinstance(x, Interval):
            todo += (x.start, x.end)
        elif isinstance(x, Union):
            parts = _parts(x)
            if len(parts) > _LEAVES:
                return None
            whole = Union(*parts)  # merges what overlaps: then the ends are the same however it was written
            if isinstance(whole, Union) and not all(isinstance(part, (Interval, FiniteSet)) for part in whole.args):
                return None
            todo += whole.args if isinstance(whole, Union) else (whole,)
        elif isinstance(x, MatrixBase):
            todo += x.flat()
        elif not isinstance(x, Expr) or isinstance(x, (Symbol, MatrixExpr)) or x.has(*_NO_NUMBER):
            return None
        else:
            numbers.append(x)
        if len(numbers) + len(todo) > _LEAVES:
            return None
    return numbers


def _parts(union: Union) -> list:
    """What is united, in a union of unions too; math-verify's parser makes one of three sets."""
    return [part for x in union.args for part in (_parts(x) if isinstance(x, Union) else (x,))]


def _at_fixed_point(x: Expr) -> Expr:
    """The value of `x` with fixed numbers for its symbols and a fixed linear function for each of its unknown ones:
    equal expressions are equal there too."""
    if x.has(AppliedUndef):
        x = x.replace(lambda part: isinstance(part, AppliedUndef), _value)
    return x.evalf(subs={s: _fixed(s.name) for s in x.free_symbols})


def _value(call: AppliedUndef) -> Expr:
    name = type(call).__name__
    return Add(_fixed(name), *(_fixed(f"{name} {i}") * x for i, x in enumerate(call.args)))


def _fixed(name: str) -> Rational:
    return Rational(zlib.crc32(name.encode("utf-8", "replace")) % 997 + 500, 1000)


def _as_complex(value: Expr) -> complex:
    """A finite number too large for a float is infinite, with its binary logarithm for an imaginary part. Not a number
    where sympy found no digit of it, as in a difference of huge powers."""
    number = complex(value)
    if not abs(number) < 1e-9 and any(part._prec < _PRECISION for part in value.atoms(Float)):
        return complex(math.nan, 0)
    if isinstance(value, Float) and cmath.isinf(number):
        _, mantissa, exponent, _ = value._mpf_
        try:
            return complex(number.real, exponent + math.log2(mantissa))
        except OverflowError:  # even the logarithm is
            return complex(number.real, math.inf)
    return number


def differ(a: tuple[complex, ...] | None, b: tuple[complex, ...] | None) -> bool:
    """Whether a number of one is clearly none of the other's, so that `verify` can't call the two equal.

    `verify` rounds to 6 decimals; the margins here are wider. Saves `simplify` on each pair of unequal answers, and
    working out huge powers.
    """
    if a is None or b is None:
        return False

    def apart(x, y):
        if cmath.isinf(x) != cmath.isinf(y):  # their difference would be no larger than the margin, infinite too
            return True
        if cmath.isinf(x):  # told apart by their logarithms, if both have one
            large = math.isinf(x.real) and math.isinf(y.real) and x.imag > 0 and y.imag > 0
            return large and (x.real != y.real or apart(x.imag, y.imag))
        return x != y and not abs(x - y) <= 1e-5 + 1e-9 * max(abs(x), abs(y))

    return any(all(apart(x, y) for y in b) for x in a) or any(all(apart(x, y) for x in a) for y in b)


# math-verify, faster with the same results: its functions are replaced in this process by equal ones.

_latex_to_sympy = math_verify.parser.parse_latex_cached.__wrapped__
_create_parser = _Latex2Sympy.create_parser
_parse_expr = sympy_parser.parse_expr
_solve = math_verify.grader.solve
_symbolic_eq = math_verify.grader.sympy_symbolic_eq
_compare_sets = math_verify.grader.sympy_compare_sets
_solve_and_compare = math_verify.grader.sympy_solve_and_compare
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?")


@lru_cache(4096)
def _parse_latex_or_error(latex: str):
    try:
        return _latex_to_sympy(latex), None
    except Exception as error:
        return None, str(error)


def _parse_latex(latex: str):
    """Responses without a box differ but their formulas repeat: math-verify keeps 20 results, and no failures."""
    result, error = _parse_latex_or_error(latex)
    if error is not None:
        raise ValueError(error)
    return result


def _parse_expr_or_number(text, *args, **kwargs):
    """`Number("31")` goes through sympy's whole expression parser, for every number in a formula."""
    if isinstance(text, str) and _NUMBER.fullmatch(text):
        return Float(text) if "." in text else Integer(text)
    return _parse_expr(text, *args, **kwargs)


class _Parsed:
    def __init__(self, tree):
        self.math = lambda: tree


def _create_parser_in_two_stages(self, latex: str):
    """A parser whose tree comes from ANTLR's SLL prediction wherever that finds one, else from the full LL prediction.

    Where SLL finds a tree it is the one that LL finds (ANTLR's documentation of `PredictionMode.SLL`), in an eighth of
    the time.
    """
    parser = _create_parser(self, latex)
    parser._interp.predictionMode = PredictionMode.SLL
    try:
        return _Parsed(parser.math())
    except Exception:
        return _create_parser(self, latex)


@lru_cache(4096)
def _solve_once(relation, symbols: frozenset):
    """math-verify solves both relations anew for each pair of them."""
    return _solve(relation, set(symbols))


def _solve_and_compare_unless_different(gold, pred, *precision) -> bool:
    """math-verify solves both equations. Two that have solutions are equal to it only if each solution of one names
    symbols that the other has, so mostly the simpler one's tell."""
    if isinstance(gold, Eq) and isinstance(pred, Eq):
        simple, other = sorted((gold, pred), key=count_ops)
        found = math_verify.grader.solve(simple, simple.free_symbols)
        if not all(isinstance(solution, dict) and solution.keys() <= other.free_symbols for solution in found):
            return False
    return _solve_and_compare(gold, pred, *precision)


def _symbolic_eq_unless_different(a, b) -> bool:
    """math-verify's last test, `simplify(a - b)` is zero: nearly all the time of a comparison of unequal answers."""
    return not differ(leaves([a]), leaves([b])) and _symbolic_eq(a, b)


def _compare_sets_unless_symbol(gold, pred, *precision) -> bool:
    """math-verify subtracts the set of a lone symbol from the other set; what is left is never surely nothing if the
    symbol isn't in that."""
    for symbol, other in ((gold, pred), (pred, gold)):
        if isinstance(symbol, Symbol) and isinstance(other, Set) and symbol not in other.free_symbols:
            sets = (FiniteSet(x) if x is symbol else x for x in (gold, pred))
            return isinstance(other, FiniteSet) and math_verify.grader.sympy_deep_compare_set_and_tuple(
                *sets, *precision
            )
    return _compare_sets(gold, pred, *precision)


math_verify.parser.parse_latex_cached = _parse_latex
sympy_parser.parse_expr = _parse_expr_or_number
_Latex2Sympy.create_parser = _create_parser_in_two_stages
math_verify.grader.solve = lambda relation, symbols: _solve_once(relation, frozenset(symbols))
math_verify.grader.sympy_symbolic_eq = _symbolic_eq_unless_different
math_verify.grader.sympy_compare_sets = _compare_sets_unless_symbol
math_verify.grader.sympy_solve_and_compare = _solve_and_compare_unless_different

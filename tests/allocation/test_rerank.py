from __future__ import annotations

from dataclasses import replace

from mpq_compiler.allocation.pose import Terms
from mpq_compiler.allocation.problem import Solution
from mpq_compiler.allocation.rerank import Reranker, Solved
from mpq_compiler.ir.program import Program
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Rounding
from mpq_compiler.quantization.requests import Requests
from tests.harness import programs

MODEL = "unet2d"


def solved(name: str, ratio: float | None = None) -> Solved:
    return Solved(Terms(ratio=ratio), {}, Solution({"all": name}, 0.0, {}, 0.0, True))


def reranker(images: int = 2) -> Reranker:
    program = programs.after(MODEL, "time-groups")

    def planned(solution: Solution) -> Program:
        return BitAllocation(uniform=solution.choices["all"]).run(program, Session())

    return Reranker(program, Session(programs.denoiser(MODEL)), images, planned)


def test_the_images_nearest_to_the_float_models_win():
    judge = reranker()
    coarse, fine = solved("int2", 0.5), solved("int8", 1.5)
    assert judge.best([coarse, fine]) is fine
    assert [row["ratio"] for row in judge.judged] == [0.5, 1.5]
    assert judge.judged[0]["noise"] > judge.judged[1]["noise"] > 0


def test_of_equal_ones_the_first_and_each_is_drawn_once(monkeypatch):
    judge, drawn = reranker(), []
    made = judge.planned
    judge.planned = lambda solution: drawn.append(solution) or made(solution)
    same = [solved("int8", 0.5), solved("int8", 0.9)]
    assert judge.best(same) is same[0] and len(drawn) == 1
    assert judge.best([same[1]]) is same[1]


def test_the_same_images_again():
    first, second = (reranker().noise(solved("int4").solution) for _ in range(2))
    assert first == second


def test_learned_rounding_is_not_learned_for_a_candidate():
    judge = reranker()
    judge.session = replace(judge.session, requests=Requests(rounding=Rounding.LEARNED))
    assert judge.noise(solved("int8").solution) > 0

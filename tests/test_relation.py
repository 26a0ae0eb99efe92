from __future__ import annotations

import pytest
import torch

from mpq_compiler import relation
from mpq_compiler.relation import Memory, loss


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queue(groups: int = 2, channels: int = 8, count: int = 50) -> Memory:
    memory = Memory.empty(groups, channels)
    for group in range(groups):
        memory.push(features(count, channels, seed=group + 10), group)
    return memory


def draw(memory: Memory, seed: int = 0) -> torch.Tensor:
    return memory.draw(torch.Generator().manual_seed(seed))


def test_entries_are_unit_vectors_without_gradients():
    memory = Memory.empty(1, 4)
    memory.push(features(5, 4).requires_grad_() * 3, 0)
    found = draw(memory)
    assert not found.requires_grad and len(found) == 5
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


def test_no_loss_where_the_student_is_the_teacher():
    contrasted, teacher = draw(queue()), features(20, 8)
    assert float(loss(teacher, teacher, contrasted)) == pytest.approx(0, abs=1e-7)
    assert float(loss(teacher * 7, teacher, contrasted)) == pytest.approx(0, abs=1e-5)  # a pixel's norm is no relation
    assert float(loss(features(20, 8, seed=1), teacher, contrasted)) > 0.1


def test_a_common_rotation_changes_nothing():
    rotation, _ = torch.linalg.qr(features(8, 8, seed=3))
    contrasted, teacher, student = draw(queue()), features(20, 8), features(20, 8, seed=1)
    rotated = loss(*(x @ rotation for x in (student, teacher, contrasted)))
    torch.testing.assert_close(rotated, loss(student, teacher, contrasted))


def test_only_the_student_has_a_gradient():
    teacher, student = features(20, 8).requires_grad_(), features(20, 8, seed=1).requires_grad_()
    found = loss(student, teacher.detach(), draw(queue()))
    (gradient,) = torch.autograd.grad(found, (student,))
    assert (gradient.abs().sum(1) > 0).all()


def test_first_in_first_out(monkeypatch):
    """A ring loses its oldest, wraps within a push, and drops no part of one."""
    monkeypatch.setattr(relation, "ENTRIES", 7)
    memory = Memory.empty(1, 1)
    memory.push(torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]]), 0)
    assert memory.filled.tolist() == [5] and memory.place.tolist() == [5]
    memory.push(torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0]]), 0)
    assert memory.filled.tolist() == [7] and memory.place.tolist() == [2]
    assert memory.entries[0, :, 0].tolist() == [-1, -1, 1, -1, 1, -1, -1]
    memory.push(torch.ones(20, 1), 0)
    assert memory.entries.eq(1).all()


def test_groups_are_apart_and_share_a_draw():
    memory = Memory.empty(3, 4)
    memory.push(features(30, 4), 0)
    memory.push(features(40, 4, seed=1), 2)
    assert memory.filled.tolist() == [30, 0, 40] and memory.entries[1].eq(0).all()
    assert len(draw(memory)) == 70 and torch.equal(draw(memory), draw(memory))


def test_an_empty_queue_has_no_loss():
    student = features(3, 4).requires_grad_()
    found = loss(student, features(3, 4), draw(Memory.empty(2, 4)))
    assert float(found.detach()) == 0 and torch.autograd.grad(found, (student,))[0].eq(0).all()


def test_pixels_of_images():
    x, at = features(2, 3, 5, 4), torch.tensor([[3, 14], [0, 7]])
    assert torch.equal(relation.pick(x, at)[1, 1], x[1, 1, 2])

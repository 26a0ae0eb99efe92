from __future__ import annotations

import pytest
import torch

from mpq_compiler.training import relation_loss
from mpq_compiler.training.relation_loss import Memory, Relations, Term, loss, own_loss
from tests.harness import programs


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queue(groups: int = 2, channels: int = 8, count: int = 50) -> Memory:
    memory = Memory.empty(groups, channels)
    for group in range(groups):
        memory.push(features(count, channels, seed=group + 10), group)
    return memory


def draw(memory: Memory, seed: int = 0) -> torch.Tensor:
    return memory.draw(torch.Generator().manual_seed(seed))


@pytest.mark.invariant("mtrd-1", "mtrd-5", "mtrd-6", "mpq-dm-3")
def test_entries_are_unit_vectors_without_gradients():
    memory = Memory.empty(1, 4)
    memory.push(features(5, 4).requires_grad_() * 3, 0)
    found = draw(memory)
    assert not found.requires_grad and len(found) == 5
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


@pytest.mark.invariant("mtrd-2", "mpq-dm-2")
def test_no_loss_where_the_student_is_the_teacher():
    contrasted, teacher = draw(queue()), features(20, 8)
    assert float(loss(teacher, teacher, contrasted)) == pytest.approx(0, abs=1e-7)
    assert float(loss(teacher * 7, teacher, contrasted)) == pytest.approx(0, abs=1e-5)  # a pixel's norm is no relation
    assert float(loss(features(20, 8, seed=1), teacher, contrasted)) > 0.1


@pytest.mark.invariant("mpq-dm-2")
def test_a_common_rotation_changes_nothing():
    rotation, _ = torch.linalg.qr(features(8, 8, seed=3))
    contrasted, teacher, student = draw(queue()), features(20, 8), features(20, 8, seed=1)
    rotated = loss(*(x @ rotation for x in (student, teacher, contrasted)))
    torch.testing.assert_close(rotated, loss(student, teacher, contrasted))


@pytest.mark.invariant("mtrd-5", "mpq-dm-3")
def test_only_the_student_has_a_gradient():
    teacher, student = features(20, 8).requires_grad_(), features(20, 8, seed=1).requires_grad_()
    found = loss(student, teacher.detach(), draw(queue()))
    (gradient,) = torch.autograd.grad(found, (student,))
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.invariant("mtrd-3")
def test_first_in_first_out(monkeypatch):
    """A ring loses its oldest, wraps within a push, and drops no part of one."""
    monkeypatch.setattr(relation_loss, "ENTRIES", 7)
    memory = Memory.empty(1, 1)
    memory.push(torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]]), 0)
    assert memory.filled.tolist() == [5] and memory.place.tolist() == [5]
    memory.push(torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0]]), 0)
    assert memory.filled.tolist() == [7] and memory.place.tolist() == [2]
    assert memory.entries[0, :, 0].tolist() == [-1, -1, 1, -1, 1, -1, -1]
    memory.push(torch.ones(20, 1), 0)
    assert memory.entries.eq(1).all()


@pytest.mark.invariant("mtrd-4", "mtrd-6", "mtrd-7")
def test_groups_are_apart_and_share_a_draw():
    memory = Memory.empty(3, 4)
    memory.push(features(30, 4), 0)
    memory.push(features(40, 4, seed=1), 2)
    assert memory.filled.tolist() == [30, 0, 40] and memory.entries[1].eq(0).all()
    assert len(draw(memory)) == 70 and torch.equal(draw(memory), draw(memory))


@pytest.mark.invariant("mtrd-4")
def test_pixels_enter_the_ring_of_their_time():
    memory = Memory.empty(2, 3)
    step = relation_loss.Step(Relations(Term("", 1.0), programs.empty(), memory, 4), draw(memory), torch.zeros(3, 4))
    step.push(torch.eye(3)[:, None].expand(3, 5, 3), torch.tensor([0, 1, 0]))
    assert memory.filled.tolist() == [10, 5]
    assert memory.entries[0, :10].argmax(1).tolist() == [0] * 5 + [2] * 5
    assert memory.entries[1, :5].argmax(1).tolist() == [1] * 5


@pytest.mark.invariant("mtrd-6")
def test_an_empty_queue_has_no_loss():
    student = features(3, 4).requires_grad_()
    found = loss(student, features(3, 4), draw(Memory.empty(2, 4)))
    assert float(found.detach()) == 0 and torch.autograd.grad(found, (student,))[0].eq(0).all()


def test_pixels_of_images():
    x, at = features(2, 3, 5, 4), torch.tensor([[3, 14], [0, 7]])
    assert torch.equal(relation_loss.pick(x, at)[1, 1], x[1, 1, 2])


# --- windows ------------------------------------------------------------------------------------------------


def window(before: int, images: int = 2) -> relation_loss.Step:
    """A step of a window over ``before`` more calls; the teacher's features are what it is given."""
    relations = Relations(Term("", 2.0, window=before + 1), programs.empty(), Memory.empty(1, 8), 15)
    inputs = [{"x": features(images, 3, 5, 8, seed=20 + i)} for i in range(before)]
    return relation_loss.Step(relations, features(0, 8), torch.tensor([[3, 14], [0, 7]]), inputs)


@pytest.mark.invariant("mpq-dm-2")
def test_no_loss_within_an_image_where_the_student_is_the_teacher():
    teacher, student, at = features(2, 3, 5, 8), features(2, 3, 5, 8, seed=1), torch.tensor([[3, 14], [0, 7]])
    norms = features(2, 3, 5, 1, seed=2).abs() + 0.1
    rotation, _ = torch.linalg.qr(features(8, 8, seed=3))
    assert float(own_loss(teacher, teacher, at)) == pytest.approx(0, abs=1e-7)
    assert float(own_loss(teacher * norms, teacher, at)) == pytest.approx(0, abs=1e-5)
    found = own_loss(student, teacher, at)
    assert float(found) > 0.1
    torch.testing.assert_close(own_loss(student @ rotation, teacher @ rotation, at), found)


def test_pixels_relate_to_their_own_image_alone():
    teacher, student, at = features(2, 3, 5, 8), features(2, 3, 5, 8, seed=1), torch.tensor([[3, 14], [0, 7]])
    both = [own_loss(student[i : i + 1], teacher[i : i + 1], at[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(own_loss(student, teacher, at), (both[0] + both[1]) / 2)


@pytest.mark.invariant("mpq-dm-3", "mtrd-5")
def test_of_a_window_the_last_step_is_live(monkeypatch):
    """The loss is that of the mean features; gradients reach those of the last call, and nothing enters the queue."""
    monkeypatch.setattr(relation_loss, "run", lambda program, inputs: inputs["x"])
    step, live = window(2), features(2, 3, 5, 8, seed=1).requires_grad_()
    shift = torch.ones(8, requires_grad=True)  # what training changes in the calls before
    inputs = {"x": features(2, 3, 5, 8)}
    found, pixels = step.loss(live, inputs, slice(0, 2), lambda given: given["x"] * 0.9 + shift)
    before = [each["x"] for each in step.before]
    mean = (live + sum(x * 0.9 + 1 for x in before)) / 3
    torch.testing.assert_close(found, 2 * own_loss(mean, (inputs["x"] + sum(before)) / 3, step.at))
    gradient, none = torch.autograd.grad(found, (live, shift), allow_unused=True)
    assert (gradient.abs().flatten(1).sum(1) > 0).all() and none is None
    assert pixels.shape == (2, 0, 8)
    step.push(pixels, torch.tensor([0, 0]))
    assert step.relations.memory.filled.tolist() == [0]
    half, _ = step.loss(live[1:], {"x": inputs["x"][1:]}, slice(1, 2), lambda given: given["x"] * 0.9 + shift)
    torch.testing.assert_close(half, 2 * own_loss(mean[1:], ((inputs["x"] + sum(before)) / 3)[1:], step.at[1:]))

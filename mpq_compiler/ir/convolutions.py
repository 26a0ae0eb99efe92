"""Convolutions over one and three axes, as linear layers and convolutions over two: the kernels know one form.

- Patches that do not overlap (stride = kernel, no padding) are a linear layer on the elements of each patch.
- A kernel of one step along time, or of one pixel, is a convolution of every frame, or of a picture [time, pixels].
- Any other kernel over three axes joins its steps along time as channels: the frames that a step needs stand side by
  side, so that one convolution of two axes adds them all up.

Weights are reordered, never computed: a code of the new weight is a code of the old one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.editor import Editor, bound

Sizes = Sequence[int]


def planar(edit: Editor, node: fx.Node) -> None:
    """Replaces a convolution over one or three axes; one that cannot be says so among the fallbacks."""
    x, weight, bias, stride, padding, dilation, groups = bound(node, None, None, None, 1, 0, 1, 1)
    axes = edit.rank(node) - 2
    if isinstance(padding, str) or weight.op != "get_attr":
        edit.program.fallbacks[node.name] = "convolution with named padding or a computed weight has no kernel"
        return
    stride, padding, dilation = (_each(value, axes) for value in (stride, padding, dilation))
    stored = edit.program.tensors[str(weight.target)]
    kernel = list(stored.shape[2:])
    if any(d != 1 for d in dilation) or (axes == 3 and groups != 1 and kernel[0] != 1):
        edit.program.fallbacks[node.name] = "convolution with dilation, or of groups over time, has no kernel"
        return
    here = _Site(edit, node, x, str(weight.target), stored, bias, stride, padding, groups)
    if kernel == stride and not any(padding) and groups == 1:
        here.patches()
    elif axes == 1:
        here.line()
    elif kernel[1:] == [1, 1] and stride[1:] == [1, 1] and not any(padding[1:]):
        here.pixels()
    else:
        here.frames()


def transposed(edit: Editor, node: fx.Node) -> None:
    """Replaces a transposed convolution over one axis by a convolution, its kernel turned round, of elements spread."""
    x, weight, bias, stride, padding, more, groups, dilation = bound(node, None, None, None, 1, 0, 0, 1, 1)
    (stride,), (padding,), (more,), (dilation,) = (_each(value, 1) for value in (stride, padding, more, dilation))
    if weight.op != "get_attr" or groups != 1 or dilation != 1:
        edit.program.fallbacks[node.name] = "transposed convolution with groups, dilation or a computed weight"
        return
    stored = edit.program.tensors[str(weight.target)]
    before = stored.shape[2] - 1 - padding
    if before < 0:
        edit.program.fallbacks[node.name] = "transposed convolution that cuts off more than its kernel has"
        return
    channels, length = (int(d) for d in edit.value(x).shape[1:])
    if stride > 1:  # zeros between the elements
        apart = edit.call(aten.constant_pad_nd.default, edit.call(aten.unsqueeze.default, x, 3), [0, stride - 1], 0.0)
        x = edit.call(aten.reshape.default, apart, [-1, channels, length * stride])
        x = edit.call(aten.slice.Tensor, x, 2, 0, (length - 1) * stride + 1)
    if before or more:
        x = edit.call(aten.constant_pad_nd.default, x, [before, before + more], 0.0)
    turned = stored.flip(2).transpose(0, 1)
    _Site(edit, node, x, str(weight.target), turned, bias, [1], [0], 1).line()


def of_frames(edit: Editor, node: fx.Node) -> None:
    """Replaces a convolution of several pictures a sample by one of a high picture: they stand one below the other.

    Rows of zeros between them are the padding of both where a kernel reaches over an edge.
    """
    x, weight, bias, stride, padding, dilation, groups = bound(node, None, None, None, 1, 0, 1, 1)
    two, three = edit.size(x)[0]
    if two == 2 or 3 * two != 2 * three or isinstance(padding, str) or weight.op != "get_attr":
        return
    count, (channels, height, width) = two // 2, (int(d) for d in edit.value(x).shape[1:])
    (step, _), (above, aside), dilations = _each(stride, 2), _each(padding, 2), _each(dilation, 2)
    reach, (features, rows, columns) = int(edit.size(weight)[2][0]), (int(d) for d in edit.value(node).shape[1:])
    if any(d != 1 for d in dilations):
        return
    between = max(above, (rows - 1) * step - above + reach - height, 0)
    between += -(height + between) % step
    frame = (height + between) // step
    behind = max(reach - 2 * above - step, 0)
    split = edit.call(aten.reshape.default, x, [-1, count, channels, height, width])
    high = edit.permuted(split, (0, 2, 1, 3, 4))
    if between:
        high = edit.call(aten.constant_pad_nd.default, high, [0, 0, 0, between], 0.0)
    high = edit.call(aten.reshape.default, high, [-1, channels, count * (height + between), width])
    if behind:
        high = edit.call(aten.constant_pad_nd.default, high, [0, 0, 0, behind], 0.0)
    arguments = (bias, _each(stride, 2), [above, aside], [1, 1], groups)
    made = edit.call(aten.conv2d.default, high, weight, *arguments)
    found = made
    if int(edit.value(made).shape[2]) > count * frame:
        found = edit.call(aten.slice.Tensor, found, 2, 0, count * frame)
    found = edit.call(aten.reshape.default, found, [-1, features, count, frame, columns])
    if frame > rows:
        found = edit.call(aten.slice.Tensor, found, 3, 0, rows)
    found = edit.call(aten.reshape.default, edit.permuted(found, (0, 2, 1, 3, 4)), [-1, features, rows, columns])
    edit.replace(node, made, found)


def _each(value: int | Sizes, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


class _Site:
    """A convolution that is replaced."""

    def __init__(
        self, edit: Editor, node: fx.Node, x: fx.Node, name: str, weight: Tensor, bias: fx.Node | None,
        stride: Sizes, padding: Sizes, groups: int,
    ) -> None:  # fmt: skip
        self.edit, self.node, self.x, self.name, self.weight, self.bias = edit, node, x, name, weight, bias
        self.stride, self.padding, self.groups = stride, padding, groups
        self.shape = [int(d) for d in edit.value(x).shape[1:]]
        """Channels and axes of a sample."""
        self.out = [int(d) for d in edit.value(node).shape[1:]]

    def patches(self) -> None:
        """A linear layer: its columns are the elements of a patch, channels outermost."""
        channels, *axes = self.shape
        counts = [size // step for size, step in zip(axes, self.stride, strict=True)]
        cut = [s for n, k in zip(counts, self.stride, strict=True) for s in (n, k)]
        whole = self.x
        for dim, (size, n, k) in enumerate(zip(axes, counts, self.stride, strict=True)):
            if n * k != size:  # the rest of an axis belongs to no patch
                whole = self.edit.call(aten.slice.Tensor, whole, dim + 2, 0, n * k)
        split = self._reshaped(whole, [channels, *cut])
        count = len(axes)
        order = [0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2)]
        rows = self._reshaped(self.edit.permuted(split, order), [*counts, self.weight[0].numel()])
        made = self._linear(rows, self.weight.flatten(1))
        self._replace(made, [*counts, self.out[0]], channels_last=True)

    def line(self) -> None:
        """A convolution of pictures of one row."""
        channels, length = self.shape
        picture = self._reshaped(self.x, [channels, 1, length])
        made = self._conv2d(picture, self.weight.unsqueeze(2), [1, *self.stride], [0, *self.padding])
        self._replace(made, self.out)

    def pixels(self) -> None:
        """A convolution of pictures whose rows are steps of time and whose columns are pixels."""
        channels, time, *frame = self.shape
        picture = self._reshaped(self.x, [channels, time, frame[0] * frame[1]])
        made = self._conv2d(picture, self.weight.flatten(3), [self.stride[0], 1], [self.padding[0], 0])
        self._replace(made, self.out)

    def frames(self) -> None:
        """A convolution of frames, in whose channels all frames stand that a step of time reads."""
        channels, _, *frame = self.shape
        steps, stride, x = self.weight.shape[2], self.stride[0], self.x
        if self.padding[0]:
            pad = [0, 0, 0, 0, self.padding[0], self.padding[0]]
            x = self.edit.call(aten.constant_pad_nd.default, x, pad, 0.0)
        reach = stride * (self.out[1] - 1) + 1
        apart = [] if stride == 1 else [stride]
        parts = [self.edit.call(aten.slice.Tensor, x, 2, s, s + reach, *apart) for s in range(steps)]
        joined = parts[0] if steps == 1 else self.edit.call(aten.cat.default, parts, 1)  # [B, steps * C, T, H, W]
        major = self.edit.permuted(joined, (0, 2, 1, 3, 4))
        rows = self.edit.call(aten.reshape.default, major, [-1, steps * channels, *frame])
        weight = self.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)  # [O, steps * C, kh, kw]
        made = self._conv2d(rows, weight, self.stride[1:], self.padding[1:])
        features, count, *size = self.out
        split = self.edit.call(aten.reshape.default, made, [-1, count, features, *size])
        self.edit.replace(self.node, made, self.edit.permuted(split, (0, 2, 1, 3, 4)))

    def _reshaped(self, x: fx.Node, sample: Sizes) -> fx.Node:
        return self.edit.call(aten.reshape.default, x, [-1, *sample])

    def _weight(self, weight: Tensor) -> fx.Node:
        return self.edit.stored(f"{self.name}:planar", weight.contiguous())

    def _linear(self, rows: fx.Node, weight: Tensor) -> fx.Node:
        return self.edit.call(aten.linear.default, rows, self._weight(weight), self.bias)

    def _conv2d(self, picture: fx.Node, weight: Tensor, stride: Sizes, padding: Sizes) -> fx.Node:
        arguments = (self.bias, list(stride), list(padding), [1, 1], self.groups)
        return self.edit.call(aten.conv2d.default, picture, self._weight(weight), *arguments)

    def _replace(self, made: fx.Node, shape: Sizes, channels_last: bool = False) -> None:
        back = self._reshaped(made, shape)
        if channels_last:
            back = self.edit.permuted(back, (0, len(shape), *range(1, len(shape))))
        self.edit.replace(self.node, made, back)

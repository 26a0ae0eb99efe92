"""`mpqc generate`: images drawn with an artifact, beside those of the float model from the same noise.

Of a pipeline (`artifact.pipeline`) a picture of a prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli import options, output
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from mpq_compiler.evaluation.painter import Painter
    from mpq_compiler.sampling.conditioning import Conditions


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("generate", run, "draw images with an artifact")
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="PNG file")
    parser.add_argument("--compare", metavar="MODEL", help="draw the same noise with the float model beside it")
    parser.add_argument("--images", type=int, metavar="N", help="images in the picture (20; of a pipeline 1)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps (10; of a pipeline its own, of a plan with --reuse its)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (default: calibration's and 1)")
    parser.add_argument("--class", dest="label", type=int, metavar="K", help="only images of class K")
    parser.add_argument("--prompt", metavar="TEXT", help="only images of this prompt, such as 'dark plain boot'")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads a pipeline away from")
    options.add_scheduler(parser)
    parser.add_argument("--image", metavar="FILE", help="a picture that a pipeline with an encoder draws from")
    parser.add_argument(
        "--strength", type=float, metavar="X", help="how much of --image is drawn anew, from 0 to 1 (default: 0.8)"
    )
    parser.add_argument(
        "--sequential", action="store_true", help="hold one part of a pipeline in memory at a time"
    )
    options.add_conditions(parser)
    options.add_threads(parser)
    options.add_key(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that exists")


def run(args: argparse.Namespace) -> Any:
    """Draw the images, write the picture, and return what it was drawn with."""
    from mpq_compiler.artifact.pipeline import is_pipeline
    from mpq_compiler.evaluation import image_grid
    from mpq_compiler.evaluation.painter import check, from_artifact, with_conditions

    picture = Path(args.output)
    if picture.suffix.lower() != ".png":
        raise UserError(f"-o {picture}: the picture is written as PNG; name it {picture.stem}.png")
    output.require_new(picture, args.overwrite)
    if is_pipeline(args.artifact):
        return _of_pipeline(args, picture)
    own = ("negative_prompt", "sequential", "image", "strength", "scheduler")
    if odd := [name for name in own if getattr(args, name)]:
        raise UserError(f"--{odd[0].replace('_', '-')} is of a pipeline, and {args.artifact} is a denoiser alone")
    args.images = 20 if args.images is None else args.images
    check(args.images, 1 if args.steps is None else args.steps, args.seed or 0)
    painter = with_conditions(from_artifact(args.artifact, args.threads, args.key), args.conditions)
    args.steps = painter.steps if args.steps is None else args.steps
    seed = painter.unseen if args.seed is None else args.seed
    conditions = painter.conditioning.chosen(args.images, args.label, args.prompt)
    painter.conditioning.arguments(conditions, args.images, args.guidance)  # refuses before the work begins
    if painter.undecoded:
        terminal.note(f"note: {painter.undecoded}")
    what = " latents" if painter.undecoded else ""
    painters = {"artifact": painter}
    if args.compare:
        painters["float model"] = _float_painter(args.compare, painter)
    drawn = {kind: _drawn(each, kind, conditions, seed, args) for kind, each in painters.items()}
    if args.compare:
        image_grid.grid([drawn["float model"], drawn["artifact"]], picture, titles=[f"float{what}", f"compiled{what}"])
    else:
        image_grid.grid(drawn["artifact"], picture)
    terminal.say(f"wrote {args.output}")
    asked = {"prompt": args.prompt, "class": args.label}
    result: dict[str, Any] = {
        "output": str(args.output),
        "images": args.images,
        "steps": args.steps,
        "seed": seed,
        "guidance": painter.conditioning.usual_guidance() if args.guidance is None else args.guidance,
        **{name: value for name, value in asked.items() if value is not None},
    }
    if args.compare:
        from mpq_compiler.evaluation.metrics import psnr_db

        result["psnr_db"] = psnr_db(drawn["float model"], drawn["artifact"])
        terminal.say(f"PSNR {result['psnr_db']:.2f} dB against {args.compare}")
    return result


def _of_pipeline(args: argparse.Namespace, picture: Path) -> dict[str, object]:
    """Draw a prompt with a pipeline, and write the pictures side by side."""
    import numpy as np

    from mpq_compiler.evaluation.painter import check
    from mpq_compiler.runtime.pipeline import STRENGTH, load_pipeline, pictures

    for name, value in {"compare": args.compare, "class": args.label, "conditions": args.conditions}.items():
        if value is not None:
            raise UserError(f"{args.artifact} is a pipeline, which draws prompts alone: leave --{name} out")
    if args.prompt is None:
        raise UserError(f"{args.artifact} is a pipeline, which draws what it is told: add --prompt 'a lighthouse'")
    if args.strength is not None and args.image is None:
        raise UserError("--strength says how much of a picture is drawn anew: add --image FILE, or leave it out")
    pipe = load_pipeline(args.artifact, args.threads, args.sequential, args.key)
    images, steps = 1 if args.images is None else args.images, pipe.steps if args.steps is None else args.steps
    seed, guidance = args.seed or 0, pipe.guidance if args.guidance is None else args.guidance
    check(images, steps, seed)
    for said in pipe.cut(args.prompt):
        terminal.note(f"note: {said}")
    strength = STRENGTH if args.strength is None else args.strength
    calls = pipe.calls(images, steps, guidance, None if args.image is None else strength)
    begin = None if args.image is None else np.repeat(pipe.encode_image(_read(args.image, pipe.size)), images, 0)
    with terminal.progress("drawing", calls) as advance:
        negative = None if args.negative_prompt is None else [args.negative_prompt] * images
        latents = pipe.latents(
            [args.prompt] * images, negative, steps=steps, guidance=guidance, seed=seed, image=begin,
            strength=strength, scheduler=options.scheduler_of(args.scheduler), progress=lambda done, total: advance(1),
        )  # fmt: skip
    pixels = pipe.decode(latents)
    (whole,) = pictures(np.concatenate([*pixels], axis=1)[None])
    write_whole(picture, lambda stream: whole.save(stream, format="PNG"))
    terminal.say(f"wrote {picture}")
    return {
        "output": str(picture),
        "images": images,
        "steps": steps,
        "seed": seed,
        "guidance": guidance,
        "prompt": args.prompt,
        **({} if args.image is None else {"image": args.image, "strength": strength}),
        **({} if args.scheduler is None else {"scheduler": args.scheduler}),
    }


def _read(file: str, size: tuple[int, int]) -> np.ndarray:
    """Pixels [1, H, W, 3] of a picture, resized where it is of another size. UserError: it is none."""
    from PIL import Image, UnidentifiedImageError

    from mpq_compiler.runtime.pipeline import pixels_of

    try:
        picture: Image.Image = Image.open(file)
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"--image {file}: there is no such file") from error
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image {file} is no picture that Pillow reads") from error
    width, height = size[1], size[0]
    if picture.size != (width, height):
        was = " x ".join(map(str, picture.size))
        terminal.note(f"note: {file} has {was} pixels and is resized to {width} x {height}")
        picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return pixels_of(picture)[None]


def _float_painter(model: str, painter: Painter) -> Painter:
    """The painter of the float model, with the sampler of the artifact's."""
    from mpq_compiler.evaluation.painter import float_model, from_denoiser, sampled_like

    return sampled_like(from_denoiser(float_model(model, painter)), painter)


def _drawn(painter: Painter, kind: str, conditions: Conditions, seed: int, args: argparse.Namespace) -> Any:
    """Images [N, channels, height, width], with a bar for their steps."""
    from mpq_compiler.evaluation.painter import BATCH

    with terminal.progress(f"drawing with the {kind}", args.steps * -(-args.images // BATCH)) as advance:
        latents = painter.draw(
            conditions, args.images, args.steps, seed, args.guidance, progress=lambda done, total: advance(1)
        )
    return painter.decode(latents)

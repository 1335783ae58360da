"""All pictures of a file, stage by stage: texts, Stage C, Stage B, Stage A, in rounds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checkpoints.lora import load_lora
from ..models.lora import LoRA, apply_loras
from ..models.previewer import Previewer
from ..pipeline import preview
from ..util.errors import WuerstchenError
from ..util.notices import tell_once
from ..util.precision import dtype_of
from .draw import Painter
from .lines import BadLine, Line
from .output import Errors, Folder, Shards
from .plan import BLOCK, Share, batches, blocks, fitting

MOST = {"cpu": 8}  # pictures at a time where memory is no matter: more are not faster on a CPU
MOST_ELSEWHERE = 32
ROUND = 16  # batches between two changes of the network that is on the device

Work = tuple[list[Line], Tensor]
T = TypeVar("T")


def _by_loras(several: Iterable[T], line: Callable[[T], Line]) -> list[list[T]]:
    """Neighbours whose lines are drawn by the same networks."""

    def loras(one: T) -> tuple:
        return line(one).loras, line(one).settings["distilled"]

    return [list(alike) for _, alike in groupby(several, key=loras)]


@dataclass
class Run:
    """What is drawn, by whom, and where it goes.

    Args:
        record: (a line, the files of its LoRAs for Stage B) -> (what the picture says of how it was drawn, its graph).
        size: pictures at a time; None is found from the free memory.
        lora_file: FILE[:STRENGTH] -> the file and the strength.
        previewer: shows what Stage C drew, where it is the last to draw.
        done: called with each number of pictures that are there.
    """

    painter: Painter
    lines: Iterable[Line | BadLine]
    output: Folder | Shards
    errors: Errors
    record: Callable[[Line, frozenset[str]], tuple[dict[str, Any], Any]]
    lora_file: Callable[[str], tuple[Any, float]]
    share: Share = Share()
    size: int | None = None
    block: int = BLOCK
    previewer: Previewer | None = None
    done: Callable[[int], object] = lambda count: None
    _loras: dict[str, LoRA] = field(default_factory=dict, init=False)

    def __call__(self) -> None:
        """Draws what is not there yet. What cannot be drawn is told in `errors` and stops nothing else.

        A batch of which a picture is missing is drawn as a whole, so that all have the same bytes as in one go.
        """
        rounds = ROUND if self.painter.model.offload is not None else 1
        if isinstance(self.output, Shards):
            for number, good, bad in blocks(self.lines, self.block):
                if not self.share.has(number):
                    continue
                self._tell(bad)
                if self.output.begin(number):
                    self.done(len(good))
                    continue
                folder = self.output.parts(number)
                self._draw(self._batches(good), folder, rounds)
                self.output.pack(number, good)
        else:
            self._draw(self._own_batches(), self.output, rounds)

    def _own_batches(self) -> Iterator[list[Line]]:
        """This process's batches of all blocks, turn and turn about."""
        turn = 0
        for number, good, bad in blocks(self.lines, self.block):
            own = self.share.has(number)
            if own:
                self._tell(bad)
            for batch in self._batches(good, told=own):
                if self.share.has(turn):
                    yield batch
                turn += 1

    def _batches(self, lines: Sequence[Line], told: bool = True) -> Iterator[list[Line]]:
        lengths, readable = {}, []
        for line in lines:
            try:
                lengths[line.index] = self.painter.lengths(line)
                readable.append(line)
            except WuerstchenError as error:
                if told:
                    self.errors.add(line, error)
        yield from batches(readable, lambda line: lengths[line.index], self._size)

    def _size(self, line: Line) -> int:
        if self.size is not None:
            return self.size
        model = self.painter.model
        most = MOST.get(model.device.type, MOST_ELSEWHERE)
        size = fitting(line, model.stage_b.config, dtype_of(model.stage_b).itemsize, model.device, most)
        if size < most:
            tell_once(
                f"there is memory for {size} pictures at a time: give --batch {size} wherever else pictures of this "
                "file are drawn, since the last bits of a picture depend on it"
            )
        return size

    def _draw(self, several: Iterator[list[Line]], folder: Folder, rounds: int) -> None:
        missing = (batch for batch in several if not self._is_there(batch, folder))
        while round_ := list(islice(missing, rounds)):
            for batch in round_:
                folder.begin(batch)
            self._draw_round(round_, folder)

    def _is_there(self, batch: list[Line], folder: Folder) -> bool:
        there = all(map(folder.has, batch))
        if there:
            self.done(len(batch))
        return there

    @torch.inference_mode()
    def _draw_round(self, round_: list[list[Line]], folder: Folder) -> None:
        painter, model = self.painter, self.painter.model
        whole = [line for batch in round_ for line in batch]
        encoder_c, encoder_b = model.text_encoder_c, model.text_encoder_b
        if round_[0][0].latent is None:
            painter.read(encoder_c, whole)
        if not folder.latents and (encoder_b is not encoder_c or whole[0].latent is not None):
            painter.read(encoder_b, whole)

        semantic = list(self._semantic(round_))
        if folder.latents:
            self._write_latents(semantic, folder)
            return
        latents: list[Work] = []
        for works in _by_loras(semantic, lambda work: work[0][0]):
            with self._at_work("Stage B", [lines for lines, _ in works]) as ready:
                for lines, latent in works if ready else ():
                    latents += self._each(lines, painter.stage_b, latent)
        with painter.at_work(model.stage_a):
            for lines, latent in latents:
                for line, one in zip(lines, latent.split(1), strict=True):
                    for _, picture in self._each([line], painter.stage_a, one):
                        folder.write(line, picture[0], *self._told(line))
                    self.done(1)

    def _semantic(self, round_: list[list[Line]]) -> Iterator[Work]:
        """The latents of Stage C: loaded, or drawn with the LoRAs of each batch."""
        painter = self.painter
        if round_[0][0].latent is not None:
            for batch in round_:
                yield from self._each(batch, painter.load)
            return
        for several in _by_loras(round_, lambda batch: batch[0]):
            with self._at_work("Stage C", several) as ready:
                for batch in several if ready else ():
                    yield from self._each(batch, painter.stage_c)

    @contextmanager
    def _at_work(self, stage: str, several: list[list[Line]]) -> Iterator[bool]:
        """The stage's network with its LoRAs, the first line's, on the device; False if one cannot be used, which is
        told of all lines."""
        model, first = self.painter.model, several[0][0]
        network = model.stage_c if stage == "Stage C" else model.stage_b
        with ExitStack() as stack:
            try:
                loaded = [one for one in map(self._lora, first.loras) if one[0].stage == stage]
                if first.settings["distilled"]:
                    loaded += [(lora, 1.0) for lora in model.distilled.values() if lora.stage == stage]
                stack.enter_context(apply_loras(network, loaded))
                stack.enter_context(self.painter.at_work(network))
            except (WuerstchenError, OSError) as error:
                for line in (line for batch in several for line in batch):
                    self.errors.add(line, error)
                yield False
                return
            yield True

    def _told(self, line: Line) -> tuple[dict[str, Any], Any]:
        loaded = (lora for lora, _ in map(self._lora, line.loras))
        return self.record(line, frozenset(lora.path.name for lora in loaded if lora.stage == "Stage B"))

    def _lora(self, text: str) -> tuple[LoRA, float]:
        path, strength = self.lora_file(text)
        if text not in self._loras:
            self._loras[text] = load_lora(path)
        return self._loras[text], strength

    def _each(self, lines: list[Line], function: Callable[..., Tensor], *given: Tensor) -> list[Work]:
        """Lines and what a stage makes of them; if it cannot, of each alone, so that one stops no others."""
        try:
            return [(lines, function(lines, *given))]
        except WuerstchenError as error:
            if len(lines) == 1:
                self.errors.add(lines[0], error)
                return []
        alone = zip(lines, *(tensor.split(1) for tensor in given), strict=True)
        return [done for line, *own in alone for done in self._each([line], function, *own)]

    def _write_latents(self, works: list[Work], folder: Folder) -> None:
        for lines, latent in works:
            for line, one in zip(lines, latent.split(1), strict=True):
                told, graph = self._told(line)
                if self.previewer is not None:
                    small = preview(self.previewer, one.to(self.previewer_device))[0]
                    folder.write(line, small, told, graph)
                folder.write_latent(line, one[0], told)
                self.done(1)

    @property
    def previewer_device(self) -> torch.device:
        assert self.previewer is not None
        return next(self.previewer.parameters()).device

    def _tell(self, bad: list[BadLine]) -> None:
        for line in bad:
            self.errors.add(line, line.reason)

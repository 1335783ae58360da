"""A sheet of pictures that shows what the embedded model can do: the same prompts and seeds every time."""

from PIL import Image, ImageDraw, ImageFont

from ..pipeline import Wuerstchen

PROMPTS = (
    "pizza, noto style",
    "cat face, fluent style",
    "rocket, noto style",
    "fox, fluent style",
    "red apple, noto style, on a blue background",
    "small sunflower, fluent style, at the top",
    "octopus, fluent style, on a yellow background",
    "big penguin, noto style, on a cyan background",
)
CFG = 2.0  # with which its colours are truest
COLUMNS = 4
SIDE, CAPTION = 256, 28  # pixels


def sample_sheet(model: Wuerstchen) -> Image.Image:
    """PROMPTS at seed 0 with guidance CFG, COLUMNS in a row, each with its prompt below."""
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, prompt in enumerate(PROMPTS):
        left, top = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + CAPTION)
        picture = (model.generate(prompt, cfg_c=CFG)[0].cpu() * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(picture), (left, top))
        pen.text((left + SIDE // 2, top + SIDE + CAPTION // 2), prompt, "black", font, anchor="mm")
    return sheet

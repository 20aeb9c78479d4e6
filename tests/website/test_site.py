"""The documentation site: what is generated, and how far answers are from its front page.

`mkdocs build --strict`, which `.ci/run` runs, finds broken links.
"""

import inspect
import re
from xml.etree import ElementTree

import pytest

import memopt
from benchmarks.results import ROOT
from memopt.optimizers.registry import METHODS
from website import algorithm, commands, methods, reference

DOCS = ROOT / "docs"
BOXES = {name: methods.sections(name)[""] for name in memopt.available("memopt")}

#: Where each question of a new user is answered: page, heading, and words of the answer.
ANSWERS = {
    "which optimizer": ("choosing.md", "Choose an optimizer", "## In short"),
    "which rate": ("convergence.md", "Default learning rates", "uses the optimizer's own"),
    "AdamW's rate": ("choosing.md", "I have AdamW's learning rate: what do I set?", "rest="),
    "my own model": ("own_models.md", "Your own model", "StackedModel"),
    "options of a command": ("commands.md", "Commands and their options", commands.PLACE),
    "fine-tune": ("fine_tuning.md", "Fine-tuning", "memopt finetune --init"),
    "sweep": ("training.md", "Compare and sweep", "memopt compare"),
    "log projected energy": ("diagnostics.md", "Diagnostics", "projected_energy("),
    "convert a checkpoint": ("export.md", "Import and export", "memopt export"),
    "what changed": ("../CHANGELOG.md", "Changes", "New names"),
    "cite": ("index.md", "Cite", "@software"),
    "resume on another mesh": ("pods.md", "3. The same mesh on a laptop", "--resume"),
    "what fits on 24 GB": ("plan.md", "Search for what fits", "--chip rtx4090"),
    "my own model on 24 GB": ("plan.md", "Other optimizers and models", "my_module:net"),
    "my own optimizer": ("comparison.md", "Choose what is compared", "MODULE:FUNCTION"),
    "MaxText": ("trainers.md", "MaxText", "maxtext_optimizer"),
    "Levanter": ("trainers.md", "Levanter", "register_levanter"),
    "Tunix": ("trainers.md", "Tunix", "PeftTrainer"),
    "Keras": ("libraries.md", "Keras", "keras_optimizer(tx)"),
    "Flax NNX": ("libraries.md", "Flax NNX", "nnx.Optimizer(model, tx"),
    "Flax linen": ("libraries.md", "Flax linen", "TrainState.create("),
    "Equinox": ("libraries.md", "Equinox", "memopt.out_in"),
    "Haiku": ("libraries.md", "Haiku", "pickle"),
    "contribute a method": ("../CONTRIBUTING.md", "Add a method", "algorithm box"),
}


def links(page):
    """The pages that a page of docs links to."""
    return set(re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]*)?\)", (DOCS / page).read_text()))


@pytest.mark.parametrize("question", ANSWERS)
def test_an_answer_is_within_two_clicks_of_the_front_page(question):
    page, heading, words = ANSWERS[question]
    near = {"index.md"} | links("index.md")
    near |= {two for one in near if (DOCS / one).parent == DOCS for two in links(one)}
    assert page in near
    text = (DOCS / page).read_text()
    [section] = re.findall(rf"^#+ {re.escape(heading)}$.*?(?=^# |\Z)", text, re.DOTALL | re.M)
    assert words in section


def test_all_pages_are_in_the_navigation_and_in_readme():
    navigation, readme = ((ROOT / name).read_text() for name in ("mkdocs.yml", "README.md"))
    pages = [page.name for page in DOCS.glob("*.md")]
    assert [page for page in pages if f" {page}" not in navigation] == []
    assert [page for page in pages if f"](docs/{page})" not in readme] == []


def test_public_names_are_documented_and_on_a_page():
    assert reference.undocumented() == []
    shown = {name for page in reference.PAGES for name in reference.names_on(page)}
    assert shown | METHODS.keys() >= reference.public_names("memopt").keys()
    modules = re.findall(
        r"^from [\w.]+ import (\w+) as \1$", (ROOT / "memopt/__init__.py").read_text(), re.M
    )
    pages = {module for page in reference.PAGES for module in page.modules}
    found = {
        getattr(memopt, name).__name__
        for name in modules
        if inspect.ismodule(getattr(memopt, name))
    }
    assert found <= pages


def test_a_name_without_a_docstring_is_seen(monkeypatch):
    monkeypatch.setattr(reference, "has_docstring", lambda module, name: name != "in_subspace")
    assert reference.undocumented() == ["memopt.in_subspace", "memopt.transforms.in_subspace"]


@pytest.mark.parametrize("name", BOXES)
def test_a_method_has_a_box_that_updates_the_weights(name):
    made = algorithm.with_boxes(BOXES[name])
    assert "::" not in made
    boxes = re.findall(r'<div class="algorithm">.*?</div>', made)
    equations = [
        "".join(cell.itertext())
        for box in boxes
        for cell in ElementTree.fromstring(box.replace("&emsp;", " ")).iter("td")
        if cell.get("class") == "equation"
    ]
    assert any(equation.startswith("W←W−") for equation in equations)


@pytest.mark.parametrize("name", BOXES)
def test_the_page_of_a_method_has_its_options_and_where_paper_and_code_differ(name):
    page = methods.page(name)
    for option in METHODS[name].defaults:
        assert option == "as_released" or f"| `{option}` |" in page
    assert METHODS[name].help["as_released"] in page
    assert METHODS[name].state in page
    assert "nan" not in re.findall(r"\w+", page)


@pytest.mark.parametrize(
    ("equation", "parts"),
    [
        ("‖W‖ / (g + ε)", ["<mfrac><mrow><mrow><mo>‖</mo><mi>W</mi>", "<mi>ε</mi></mrow></mfrac>"]),
        ("√max(1, n/m) · O", ["<msqrt><mrow><mtext>max</mtext>", "</msqrt><mo>·</mo><mi>O</mi>"]),
        ("Q_Lᵀ G", ["<msubsup><mi>Q</mi><mrow><mi>L</mi></mrow><mrow><mo>⊤</mo></mrow></msubsup>"]),
        ("t^−decay", ["<msup><mi>t</mi><mrow><mo>−</mo><mtext>decay</mtext></mrow></msup>"]),
        ("M̂", ['<mover accent="true"><mi>M</mi><mo>^</mo></mover>']),
        ("β₁ᵗ", ["<msubsup><mi>β</mi><mrow><mn>1</mn></mrow><mrow><mi>t</mi></mrow></msubsup>"]),
        ("‖x‖_(D̂⁻¹)", ["<msub><mrow><mo>‖</mo><mi>x</mi><mo>‖</mo></mrow><mrow><msup>"]),
    ],
)  # fmt: skip
def test_plain_text_is_set_as_mathematics(equation, parts):
    made = algorithm.math(equation)
    ElementTree.fromstring(made)
    assert [part for part in parts if part not in made] == []


def test_a_method_moves_as_many_bytes_on_its_page_as_on_the_page_of_speed():
    [moved] = re.findall(r"moves ([\d.]+) times", methods.page("muon"))
    assert f"`memopt.muon` {moved}" in " ".join((DOCS / "speed.md").read_text().split())


def test_a_command_is_described_in_plain_lines_with_all_its_options():
    shown = commands.help_of("tokenizer train")
    assert shown.startswith("usage: memopt tokenizer train [-h]")
    assert re.search(r"^  --vocab-size INT +\S", shown, re.MULTILINE)
    assert not re.search("[╭│╰\x1b]", shown)
    assert max(map(len, shown.splitlines())) <= commands.WIDTH

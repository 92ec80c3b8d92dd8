"""Metrics against numbers worked out by hand."""

import math

import pytest
import torch

from molora.evaluation.metrics import (
    METRICS,
    Result,
    accuracy,
    exact_match,
    loss,
    match_label,
    mean,
    overall,
    perplexity,
    token_nll,
)


def results(predictions, targets):
    return [Result(i, *pair) for i, pair in enumerate(zip(predictions, targets, strict=True))]


def test_exact_match_strips_outer_whitespace_only():
    assert mean(exact_match, results([" abc\n", "a b", "x"], ["abc", "ab", "x "])) == pytest.approx(2 / 3)


def test_accuracy_counts_no_answer_as_wrong():
    found = results(["World", None, "Tech"], ["World", "Tech", "Sports"])
    assert mean(accuracy, found) == pytest.approx(1 / 3)
    assert mean(accuracy, results([None], [None])) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_scores_over_nothing_are_refused(metric):
    with pytest.raises(ValueError, match="there are no results"):
        mean(METRICS[metric], [])


def test_match_label_ignores_case_but_not_extra_words():
    labels = ["World", "Sports"]
    assert match_label(" sports\n", labels) == "Sports"
    assert match_label("sports news", labels) is None


def test_token_nll_is_uniform_entropy_for_flat_logits():
    logits = torch.zeros(2, 4, 8)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 5]])
    total, tokens = token_nll(logits, labels, shift=True)
    assert tokens.tolist() == [3, 1]
    assert total.tolist() == pytest.approx([3 * math.log(8), math.log(8)], rel=1e-6)
    # unshifted, the first column is read too: here it is masked in both rows, so nothing changes
    assert token_nll(logits, labels, shift=False)[1].sum() == 4


def test_token_nll_shift_reads_the_previous_position():
    logits = torch.full((1, 2, 3), -50.0)
    logits[0, 0, 2] = 50.0  # position 0 is certain that token 2 follows
    labels = torch.tensor([[0, 2]])
    assert token_nll(logits, labels, shift=True)[0] == pytest.approx(0.0, abs=1e-6)
    assert token_nll(logits, labels, shift=False)[0] > 50


def test_streamed_loss_weighs_tokens_not_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :5] = -100
    found = []
    for part in (slice(0, 1), slice(1, 3)):
        nll, tokens = token_nll(logits[part], labels[part], shift=True)
        found += [Result(0, nll=n, count=c) for n, c in zip(nll.tolist(), tokens.tolist(), strict=True)]
    assert sum(result.count for result in found) == 11
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert mean(loss, found) == pytest.approx(whole.item(), rel=1e-6)


def test_a_loss_over_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="no labelled token"):
        mean(loss, [Result(0, nll=0.0, count=0)])


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


def pairs(*both):
    return [Result(i, said, wanted) for i, (said, wanted) in enumerate(both)]


def test_token_f1_counts_shared_words_as_squad_does():
    # "cat sat down" and "cat sat on mat": 2 shared of 3 and 4
    assert overall("token_f1", pairs(("The cat sat down!", "a cat sat on the mat"))) == pytest.approx(4 / 7)
    assert overall("token_f1", pairs(("yes", "Yes."), ("", "the"), ("x", ""))) == pytest.approx(2 / 3)


def test_rouge_l_is_that_of_the_package_and_of_the_longest_common_subsequence():
    # "police kill the gunman" against "police killed the gunman": the stems agree
    assert overall("rouge_l", pairs(("police kill the gunman", "police killed the gunman"))) == pytest.approx(
        1.0
    )
    # 3 of 4 words in order on both sides
    assert overall("rouge_l", pairs(("police kill the man", "police killed the gunman"))) == pytest.approx(
        0.75
    )


def test_bleu_and_chrf_are_of_the_corpus_by_sacrebleu():
    import sacrebleu

    both = [("the cat sat on the mat", "the cat sat on a mat"), ("hello there world", "hello world")]
    said, wanted = [one for one, _ in both], [[two for _, two in both]]
    assert overall("bleu", pairs(*both)) == pytest.approx(sacrebleu.corpus_bleu(said, wanted).score / 100)
    assert overall("chrf", pairs(*both)) == pytest.approx(sacrebleu.corpus_chrf(said, wanted).score / 100)
    assert overall("bleu", pairs(("same words here now", "same words here now"))) == pytest.approx(1.0)
    assert METRICS["bleu"](Result(0, "hello world", "hello world")) == pytest.approx(1.0), "short, by itself"


def test_macro_f1_weighs_classes_alike():
    sklearn = pytest.importorskip("sklearn.metrics")
    said, wanted = ["a", "a", "b", "a", "c"], ["a", "a", "b", "b", "b"]
    expected = sklearn.f1_score(wanted, said, average="macro")
    assert overall("macro_f1", pairs(*zip(said, wanted, strict=True))) == pytest.approx(expected)
    # two classes; b is never named: 2 * 2 / (2 + 2) and 0
    assert overall("macro_f1", pairs(("a", "a"), ("a", "a"), (None, "b"))) == pytest.approx(0.5)


def test_a_metric_without_its_package_is_refused_before_training(monkeypatch):
    from molora import ConfigError
    from molora.data import tasks

    monkeypatch.setattr(tasks, "find_spec", lambda name: None if name == "sacrebleu" else name)
    with pytest.raises(ConfigError, match=r"metric bleu needs the package sacrebleu") as error:
        tasks.Task("a", 0, [], [], metric="bleu")
    assert "molora[metrics]" in str(error.value)
    assert tasks.Task("a", 0, [], [], metric="token_f1").metric == "token_f1"

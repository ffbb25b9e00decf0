import pytest

from service.prompt.defaults import GenerationDefaults


def test_a_model_that_says_nothing_samples_as_the_api_does():
    assert GenerationDefaults.read({}) == GenerationDefaults(1.0, 1.0, 0, 1.0, frozenset())


def test_generation_config_sets_the_defaults():
    config = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    assert GenerationDefaults.read(config) == GenerationDefaults(0.7, 0.8, 20, 1.05, frozenset())


def test_min_p_and_the_penalties_are_read_where_they_are_given():
    read = GenerationDefaults.read({"min_p": 0.05, "presence_penalty": 1.5, "frequency_penalty": -0.5})
    assert (read.min_p, read.presence_penalty, read.frequency_penalty) == (0.05, 1.5, -0.5)


def test_do_sample_false_makes_greedy_the_default():
    assert GenerationDefaults.read({"do_sample": False, "temperature": 0.7}).temperature == 0


@pytest.mark.parametrize(("eos", "ids"), [(5, {5, 9}), ([5, 6], {5, 6, 9}), (None, {9})])
def test_end_of_text_is_one_id_or_a_list_and_joins_the_templates_own(eos, ids):
    assert GenerationDefaults.read({"eos_token_id": eos}, end_ids=[9]).stop_token_ids == ids


@pytest.mark.parametrize("bad", [None, "hot", True, -1, float("nan")])
def test_a_value_that_makes_no_sense_counts_as_missing(bad):
    config = {"temperature": bad, "top_p": bad, "top_k": bad, "repetition_penalty": bad}
    config |= {"min_p": bad}
    assert GenerationDefaults.read(config) == GenerationDefaults()


@pytest.mark.parametrize("bad", [None, "much", True, -3, 2.5, float("nan")])
def test_a_penalty_outside_of_the_apis_limits_counts_as_missing(bad):
    config = {"presence_penalty": bad, "frequency_penalty": bad}
    assert GenerationDefaults.read(config) == GenerationDefaults()

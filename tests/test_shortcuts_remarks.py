"""What is said under a sweep's table of single runs and readouts."""

from sweep_results import made

from moco.measure import SHARED
from moco.readout import WEIGHT_DECAYS
from moco.shortcuts_report import table


def test_the_table_says_how_many_readouts_chose_the_end_of_the_grid():
    results = [result | {"weight_decays": list(WEIGHT_DECAYS)} for result in made()]
    for result in results:
        for readout in result["readout"].values():
            readout["weight_decay"] = 0.1
    assert "weight decay" not in table(results)
    for result in results[:4]:
        result["readout"]["texture"]["weight_decay"] = min(WEIGHT_DECAYS)
    of_all = f"shape 0 of {len(results)}, texture 4 of {len(results)}, color 0 of {len(results)}"
    assert f"the least weight decay there is, {min(WEIGHT_DECAYS):g}: {of_all}\n" in table(results)
    results[2][SHARED] = {**results[2]["readout"]}
    assert "shape (shared bits) 0 of 1, texture (shared bits) 1 of 1, color" in table(results)
    results[7]["readout"]["color"]["weight_decay"] = max(WEIGHT_DECAYS)
    assert f"the greatest weight decay there is, {max(WEIGHT_DECAYS):g}: shape 0 of" in table(results)


def test_runs_of_other_code_or_packages_are_told():
    results = [result | {"code": "aaa", "versions": {"torch": "2.11", "numpy": "2"}} for result in made()]
    assert "made by the same" not in table(results) and "made by the same" not in table(made())
    results[0] |= {"code": "bbb"}
    results[1] |= {"versions": {"torch": "2.14", "numpy": "2"}}
    text, others = table(results), len(results) - 1
    assert f"Not all runs were made by the same code: bbb (runs: 1), aaa (runs: {others})\n" in text
    assert f"the same torch: 2.11 (runs: {others}), 2.14 (runs: 1)\n" in text and "same numpy" not in text
    results[2] |= {"hardware": {"cpu": "one", "gpu": None}}
    results[3] |= {"hardware": {"cpu": "other", "gpu": None}}
    assert "the same cpu: one (runs: 1), other (runs: 1)\n" in table(results) and "gpu" not in table(results)
    del results[0]["code"]  # an older one
    assert f"the same code: unknown (runs: 1), aaa (runs: {others})\n" in table(results)


def test_readouts_that_did_not_converge_are_named():
    results = made()
    assert "not converge" not in table(results)
    results[5]["readout"]["shape"]["converged"] = False
    assert f"Readouts that did not converge: {results[5]['name']}: shape\n" in table(results)
    results[6]["readout"]["shape"]["converged"] = results[6]["readout"]["color"]["converged"] = False
    assert f"{results[5]['name']}: shape; {results[6]['name']}: shape, color\n" in table(results)
    results = made("randbit", bits=(3,), shared=True)
    assert "not converge" not in table(results)
    results[5][SHARED]["shape"]["converged"] = False
    assert f"Readouts that did not converge: {results[5]['name']}: shape (shared bits)\n" in table(results)


def test_a_fit_that_was_only_tried_is_told_apart():
    results = made()
    results[5]["readout"]["shape"] |= {"converged": False, "gradient": 9e-6}
    results[6]["readout"]["color"] |= {"converged": False, "gradient": 2e-5}
    text = table(results)
    only_tried = "Readouts that converged, but for a fit made to choose the weight decay"
    assert f"{only_tried}: {results[5]['name']}: shape\n" in text
    assert f"Readouts that did not converge: {results[6]['name']}: color\n" in text


def test_a_factor_that_pictures_lack_is_told():
    assert "pictures" not in table(made())[300:]
    hidden = [result | {"hide": "color", "read_without": None} for result in made()]
    assert "All pictures have the same color, those to train on and those to read from.\n" in table(hidden)
    read = [result | {"hide": None, "read_without": "shape"} for result in made()]
    assert "Trained on all factors, and read from the same pictures with one shape for all.\n" in table(read)
    assert "All pictures" not in table(read) and "Trained on all" not in table(hidden)
    both = [result | {"hide": "color", "read_without": "color=blue"} for result in made()]
    other = "Trained on pictures that all have color red, and read from the same with color blue.\n"
    assert other in table(both) and "All pictures" not in table(both)
    changes = {"hide": "color=white", "recolor": True, "read_without": "color"}
    recolored = [result | changes for result in made()]
    told = "Trained on views of colors at random, and read from the same pictures, all with color "
    assert f"{told}red.\n" in table(recolored) and "that all have" not in table(recolored)
    assert f"{told}white.\n" in table([result | {"read_without": None} for result in recolored])

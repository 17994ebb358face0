"""The comparison with the released code's vectors: it passes on them, on any others of their
format, and on nothing that differs from them.
"""

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fkv import models
from tests import oracles, reference
from tests.policies.test_policies import h2o, rkv, snapkv, streaming_llm

REPLAY = (
    "full logits",
    "full nll",
    "number of evictions and candidates",
    "evicted sets",
    "candidate sets",
    "future scores",
    "evicted logits",
    "evicted nll",
    "entries held at evictions",
    "scorer scores",
    "scorer scores, exported and read",
    "scorer scores, in the released layout",
    "ranking loss per layer",
)
LOSSES = ("ranking loss", "advantages", "grpo loss", "grpo kl", "reward")


def assert_passes(directory, models_there, kept):
    rows = reference.check(directory)
    want = {(name, what) for name in models_there for what in REPLAY}
    want |= {("losses.npz", what) for what in LOSSES}
    want |= {("baselines.npz", f"kept_{name}") for name in kept}
    found = [(row.where, row.what) for row in rows]
    assert set(found) == want and len(found) == len(want)
    assert [row for row in rows if not row.passed] == []


# ---- the released code's vectors


def test_the_released_vectors_are_reproduced(shared_reference):
    kept = ("h2o_first", "rkv_lambda0.07", "rkv_lambda0.1", "snapkv", "streaming_llm")
    assert_passes(shared_reference, ("qwen3_tiny", "qwen2_tiny"), kept)


def check_spoiled(directory, capsys):
    """Exit code of the check, and which comparisons it says have failed."""
    code = reference.main(["--dir", str(directory)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    return code, {re.split(" {2,}", line)[1] for line in lines}


def one_off(place, by):
    def change(z, name):
        z[name] = z[name].astype(np.float64)
        z[name][place] += by

    return change


def swap_last_evicted(z, name):
    """Drops the candidate of highest future score instead of another."""
    last = 0, -1, 0
    z[name][last][0] = z["candidate_positions"][last][z["future_scores"][last].argmax()]


def shift_interval(z, name):
    z[name] = np.array(24)


def lose_the_last(z, name):
    for one in (name, "candidate_positions", "future_scores"):
        z[one] = z[one][:, :-1]


def other_token(z, name):
    z[name][0, 3] = (z[name][0, 3] + 1) % 97


SPOILED_REPLAY = {
    "full_logits": (one_off((70, 5), 5e-4), {"full logits"}),
    "full_nll": (one_off(3, -5e-4), {"full nll"}),
    "evict_positions": (swap_last_evicted, {"evicted sets", "evicted logits", "evicted nll"}),
    "evict_positions, one event less": (lose_the_last, {"number of evictions and candidates"}),
    "candidate_positions": (
        one_off((1, 2, 1, 0), 1000),
        {"candidate sets", "entries held at evictions"},
    ),
    "future_scores": (one_off((2, 3, 0, 7), 1e-4), {"future scores"}),
    "evicted_logits": (one_off((180, 0), 5e-4), {"evicted logits"}),
    "evicted_nll": (one_off(179, np.nan), {"evicted nll"}),
    "scorer_scores": (
        one_off((0, 7, 1, 47), 5e-4),
        {
            "scorer scores",
            "scorer scores, exported and read",
            "scorer scores, in the released layout",
        },
    ),
    "ranking_loss_per_layer": (one_off(1, 5e-4), {"ranking loss per layer"}),
    "input_ids": (other_token, {"full logits", "full nll", "evicted logits"}),
    "interval": (shift_interval, {"number of evictions and candidates"}),
}


def spoil(path, change, name):
    arrays = dict(np.load(path))
    change(arrays, name.split(",")[0])
    np.savez(path, **arrays)


@pytest.mark.parametrize("name", SPOILED_REPLAY)
def test_a_spoiled_replay_is_noticed(shared_reference, tmp_path, capsys, name):
    shutil.copytree(
        shared_reference / "qwen2_tiny", tmp_path / "model", copy_function=shutil.copyfile
    )
    change, want = SPOILED_REPLAY[name]
    spoil(tmp_path / "model" / "replay.npz", change, name)
    code, failed = check_spoiled(tmp_path, capsys)
    assert code == 1 and want <= failed
    if len(want) == 1:
        assert failed == want


SPOILED_LOSSES = {
    "rank_loss": {"ranking loss"},
    "rank_scores": {"ranking loss"},
    "grpo_returns": {"advantages"},
    "grpo_advantages": {"advantages", "grpo loss"},
    "grpo_scores_new": {"grpo loss", "grpo kl"},
    "grpo_scores_old": {"grpo loss"},
    "grpo_scores_ref": {"grpo loss", "grpo kl"},
    "grpo_loss": {"grpo loss"},
    "grpo_kl": {"grpo kl"},
    "reward_evicted_nll": {"reward"},
    "reward_full_nll": {"reward"},
    "reward": {"reward"},
}


@pytest.mark.parametrize("name", SPOILED_LOSSES)
def test_a_spoiled_loss_is_noticed(shared_reference, tmp_path, capsys, name):
    shutil.copyfile(shared_reference / "losses.npz", tmp_path / "losses.npz")
    spoil(tmp_path / "losses.npz", one_off(..., np.nan), name)
    assert check_spoiled(tmp_path, capsys) == (1, SPOILED_LOSSES[name])


@pytest.mark.parametrize("by", [5e-4, -5e-4])
@pytest.mark.parametrize("name", ["rank_loss", "grpo_loss", "grpo_kl", "reward"])
def test_a_loss_a_little_off_is_noticed(shared_reference, tmp_path, capsys, name, by):
    shutil.copyfile(shared_reference / "losses.npz", tmp_path / "losses.npz")
    spoil(tmp_path / "losses.npz", one_off((), by), name)
    assert check_spoiled(tmp_path, capsys) == (1, SPOILED_LOSSES[name])


@pytest.mark.parametrize(
    "method", ["h2o_first", "rkv_lambda0.07", "rkv_lambda0.1", "snapkv", "streaming_llm"]
)
def test_a_spoiled_baseline_is_noticed(shared_reference, tmp_path, capsys, method):
    def swap(z, name):
        kept = z[name][1]
        kept[-1] = np.setdiff1d(np.arange(56), kept)[0]  # the newest for one that was dropped

    shutil.copyfile(shared_reference / "baselines.npz", tmp_path / "baselines.npz")
    spoil(tmp_path / "baselines.npz", swap, f"kept_{method}")
    assert check_spoiled(tmp_path, capsys) == (1, {f"kept_{method}"})


def test_a_baseline_not_known_here_fails(shared_reference, tmp_path, capsys):
    def add(z, name):
        z[name] = z["kept_snapkv"]

    shutil.copyfile(shared_reference / "baselines.npz", tmp_path / "baselines.npz")
    spoil(tmp_path / "baselines.npz", add, "kept_snapkw")
    assert check_spoiled(tmp_path, capsys) == (1, {"kept_snapkw: a method not known here"})


def test_unspoiled_files_pass(shared_reference, tmp_path, capsys):
    for name in ("losses.npz", "baselines.npz"):
        shutil.copyfile(shared_reference / name, tmp_path / name)
    assert check_spoiled(tmp_path, capsys) == (0, set())


def test_vectors_of_another_shape_end_the_check(shared_reference, tmp_path):
    def cut(z, name):
        z[name] = z[name][:2]

    shutil.copyfile(shared_reference / "losses.npz", tmp_path / "losses.npz")
    spoil(tmp_path / "losses.npz", cut, "grpo_advantages")
    with pytest.raises(SystemExit, match=r"error: shapes differ, ours \(3,\) and theirs \(2,\)"):
        reference.main(["--dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["", "absent"])
def test_nothing_to_compare_is_an_error(tmp_path, capsys, name):
    assert reference.main(["--dir", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: no replay.npz")


def test_only_ties_excuse_another_set():
    position, score = np.array([[3, 5, 8, 9]]), np.array([[0.1, 0.2, 0.2, 0.4]])
    for theirs, wrong in [([5, 3], 0), ([3, 8], 0), ([8, 5], 1), ([3, 9], 1), ([3, 7], 1)]:
        assert (
            reference.wrong_sets(np.array([[3, 5]]), np.array([theirs]), position, score) == wrong
        )


# ---- vectors of our own, in the same format


def plain_ranking_loss(phi, alpha, margin):
    """Mean hinge of eviction scores over the pairs of one group; None without a pair."""
    pairs = [
        max(0, margin - (phi[i] - phi[j]))
        for i, j in np.ndindex(len(phi), len(phi))
        if alpha[i] < alpha[j]
    ]
    return np.mean(pairs) if pairs else None


def add_scorers(directory, config, rng):
    """Writes random scorers into a checkpoint as the released code does; returns them as ours."""
    k, f = config.kv_heads, 2 * config.head_dim + 8 * config.group_size
    tensors = load_file(directory / "model.safetensors")
    shapes = {"fc1.weight": (k, f, 16), "fc1.bias": (k, 16), "fc2.weight": (k, 16, 1)}
    shapes |= {"fc2.bias": (k, 1), "feature_norm.weight": (f,), "feature_norm.bias": (f,)}
    ours = {name: [] for name in ("w1", "b1", "w2", "b2")}
    for layer in range(config.layers):
        drawn = {n: rng.normal(scale=0.4, size=s).astype(np.float32) for n, s in shapes.items()}
        for name, tensor in drawn.items():
            tensors[f"model.layers.{layer}.self_attn.judge_model.{name}"] = tensor
        ours["w1"].append(drawn["fc1.weight"])
        ours["b1"].append(drawn["fc1.bias"])
        ours["w2"].append(drawn["fc2.weight"][..., 0])
        ours["b2"].append(drawn["fc2.bias"][..., 0])
    save_file(tensors, directory / "model.safetensors")
    return {name: np.stack(layers) for name, layers in ours.items()}


def make_checkpoint(directory, config, params, tokens, budget, interval):
    """A checkpoint directory with its `replay.npz`, by the oracles."""
    models.save(directory, models.LM(params, config))
    rng = np.random.default_rng(tokens)
    scorers = add_scorers(directory, config, rng)
    token = rng.integers(config.vocab_size, size=tokens)
    events = oracles.golden_of_model(config, params, token, budget, interval)
    scores = [[[] for _ in range(config.kv_heads)] for _ in range(config.layers)]

    def golden(layer, head, state):
        if state.event == len(events[layer][head]):
            return state.positions[:interval]  # no token follows
        feature = oracles.features(state, budget, "reference")
        scores[layer][head].append(oracles.mlp(scorers, layer, head, feature))
        return events[layer][head][state.event][2]

    def stacked(groups):
        return np.moveaxis(np.array(groups), 1, 2)  # [layers, evictions, KV heads, ...]

    vectors = {
        "candidate_positions": stacked([[[e[0] for e in g] for g in y] for y in events]),
        "future_scores": stacked([[[e[1] for e in g] for g in y] for y in events]),
        "evict_positions": stacked([[[e[2] for e in g] for g in y] for y in events]),
    }
    for name, hidden in (
        ("full", oracles.full(config, params, token)[0]),
        ("evicted", oracles.replay(config, params, token, budget, interval, golden)),
    ):
        head = params["embed_vm" if config.tied_embeddings else "head_vm"]
        x = oracles.rms_norm(hidden, np.asarray(params["final_norm_m"]), config.rms_eps)
        vectors[f"{name}_logits"] = x @ np.asarray(head, np.float64).T
        log_p = oracles.log_probabilities(config, params, hidden)
        vectors[f"{name}_nll"] = -log_p[np.arange(tokens - 1), token[1:]]
    vectors["scorer_scores"] = stacked(scores)
    losses = []
    for phi, alpha in zip(vectors["scorer_scores"], vectors["future_scores"], strict=True):
        groups = [plain_ranking_loss(phi[g], alpha[g], 0.01) for g in np.ndindex(phi.shape[:2])]
        losses.append(np.mean([x for x in groups if x is not None]))
    vectors |= {
        "ranking_loss_per_layer": losses,
        "input_ids": token[None],
        "budget": budget,
        "interval": interval,
    }
    np.savez(directory / "replay.npz", **vectors)


def make_losses(path):
    rng = np.random.default_rng(0)
    scores, oracle = rng.normal(size=(2, 4, 15))
    oracle = np.round(oracle, 1)  # some are equal: no pairs
    oracle[2] = 0.5  # and a group without any
    groups = [plain_ranking_loss(s, -o, 0.02) for s, o in zip(scores, oracle, strict=True)]
    vectors = {
        "rank_scores": scores,
        "rank_oracle": oracle,
        "rank_margin": 0.02,
        "rank_loss": np.mean([x for x in groups if x is not None]),
    }
    shape, dropped, clip, kl_weight = (2, 5, 3), 4, 0.1, 0.3
    new = rng.normal(size=(*shape, 11))
    old, ref = new + 0.4 * rng.normal(size=(2, *new.shape))
    index = np.argsort(rng.random(new.shape), axis=-1)[..., :dropped]
    reward = -rng.random(shape[1])
    advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
    log_p = [
        np.take_along_axis(np.log(oracles.softmax(x)), index, axis=-1) for x in (new, old, ref)
    ]
    terms, kls = [], []
    for place in np.ndindex(*shape, dropped):
        n, o, r = (x[place] for x in log_p)
        a, ratio = advantage[place[1]], np.exp(n - o)
        terms.append(min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        kls.append(np.exp(r - n) - (r - n) - 1)
    vectors |= {"grpo_scores_new": new, "grpo_scores_old": old, "grpo_scores_ref": ref}
    vectors |= {"grpo_indices": index, "grpo_returns": reward, "grpo_advantages": advantage}
    vectors |= {"grpo_clip": clip, "grpo_kl_weight": kl_weight, "grpo_kl": np.mean(kls)}
    vectors["grpo_loss"] = -np.mean(terms) + kl_weight * np.mean(kls)
    entropy, full, evicted = 2 * rng.random((3, 90))
    skip, eta, fraction = 33, 0.4, 0.3
    by_entropy = sorted(range(skip, 90), key=lambda i: entropy[i])
    low = by_entropy[: 57 - 17]  # 30 % of 57, rounded down, are high
    harm = [(evicted[i] - full[i]) ** 2 for i in low if evicted[i] - full[i] > eta]
    vectors |= {"reward_entropy": entropy, "reward_full_nll": full, "reward_evicted_nll": evicted}
    vectors |= {"reward_skip": skip, "reward_eta": eta, "reward_high_entropy_fraction": fraction}
    vectors["reward"] = -sum(harm) / len(low)
    np.savez(path, **vectors)


def make_baselines(path, heads=4, kv_heads=1, budget=20, interval=12, dim=8):
    rng = np.random.default_rng(1)
    slots, group = budget + interval, heads // kv_heads
    query = 2 * rng.normal(size=(heads, slots, dim)).astype(np.float32)
    key, value = rng.normal(size=(2, kv_heads, slots, dim)).astype(np.float32)
    sizes = {"window": 5, "kernel": 3}
    rules = {
        "streaming_llm": lambda s: streaming_llm(s, interval, sinks=2),
        "snapkv": lambda s: snapkv(s, interval, **sizes),
        "rkv_lambda0.5": lambda s: rkv(s, interval, mix=0.5, **sizes),
        "h2o_first": lambda s: h2o(s, interval),
    }
    kept = {name: [] for name in rules}
    for head in range(kv_heads):
        q = query[head * group : (head + 1) * group].astype(np.float64)
        k = key[head].astype(np.float64)
        p = [oracles.probabilities(x, k, range(slots), range(slots)) for x in q]
        state = oracles.State(
            positions=np.arange(slots),
            keys=k,
            queries=np.moveaxis(q, 0, 1)[-interval:],
            cumulative=np.sum(p, axis=1).T,
        )
        for name, rule in rules.items():
            positions, score = rule(state)
            gone = positions[np.argsort(score, kind="stable")[:interval]]
            kept[name].append(np.setdiff1d(np.arange(slots), gone))
    arrays = {f"kept_{name}": np.array(rows) for name, rows in kept.items()}
    arrays |= {"q": query, "k": key, "v": value, "first_tokens": 2, **sizes}
    np.savez(path, budget=budget, interval=interval, **arrays)


# Groups of 4 heads and of one; tied and untied; T no multiple of L, and T = B + 2L; one family that
# the released vectors lack.
CHECKPOINTS = {
    "grouped": (dict(family="qwen3", heads=8, kv_heads=2, tied_embeddings=True), 75, 24, 12),
    "llama": (dict(family="llama", heads=3, kv_heads=3, rope_theta=5e3), 50, 40, 5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of vectors of other sizes than the released ones, not to be changed."""
    path = tmp_path_factory.mktemp("made")
    for name, (fields, tokens, budget, interval) in CHECKPOINTS.items():
        make_checkpoint(path / name, *oracles.make_model(**fields), tokens, budget, interval)
    make_losses(path / "losses.npz")
    make_baselines(path / "baselines.npz")
    return path


def test_any_directory_of_the_format_is_checked(made):
    kept = ("h2o_first", "rkv_lambda0.5", "snapkv", "streaming_llm")
    assert_passes(made, CHECKPOINTS, kept)

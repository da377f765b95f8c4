"""Training code of others: Hugging Face's Trainer, Lightning and MONAI, with torch's loss and ours.

Run by ``make test-clients``; a test whose package is missing is skipped. Nothing is downloaded: the
networks are small and start from random numbers, texts are source files of Python, volumes are
drawn. Each run is watched below autograd, so that a loss which quietly stayed native fails.
"""

import argparse
import collections
import contextlib
import copy
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wce_torch

pytestmark = pytest.mark.clients

# Native and ours add in other orders. The optimizers (SGD, or Adam with an epsilon that is not
# small against the gradients) pass such a difference on without blowing it up.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
# Under autocast both compute the loss in float32 and round its gradient to bfloat16 once. Elements
# next to a rounding border may fall on the other side, half a percent of that element, and that is
# all that differs in the following steps.
AUTOCAST = {"rtol": 5e-5, "atol": 0.0}
BF16_ROUNDING = 2.0**-8  # largest relative error of one rounding to bfloat16
WAYS = ("patched", "explicit")


class Watch(TorchDispatchMode):
    """Counts the operators that compute a cross entropy, as they arrive below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "wce":
            self.calls[f"wce.{name}"] += 1
        elif name in ("nll_loss_forward", "nll_loss2d_forward", "_log_softmax"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    def saw_only_ours(self, steps):
        return self.calls == {"wce.forward": steps, "wce.backward": steps}

    def saw_only_native(self):
        return bool(self.calls) and not any(name.startswith("wce.") for name in self.calls)


def package(name):
    return pytest.importorskip(name, reason=f"{name} is missing; make test-clients installs it")


def patched_if(way):
    return wce_torch.patched() if way == "patched" else contextlib.nullcontext()


def loss_class(way):
    return wce_torch.CrossEntropyLoss if way == "explicit" else nn.CrossEntropyLoss


def assert_same_curve(got, want, rtol, atol):
    got, want = torch.tensor(got), torch.tensor(want)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def source_bytes(module, length):
    """The first bytes of a module of Python's library as integers from 0 to 255."""
    text = pathlib.Path(module.__file__).read_bytes()
    return torch.tensor(list(text[:length]))


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)  # the tensors are small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about data loader workers, loggers and the like
        yield


# ---- Hugging Face Trainer ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    os.environ["HF_HUB_OFFLINE"] = "1"
    package("accelerate")
    transformers = package("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


VOCABULARY, WINDOW = 256, 48


def gpt2(hf, kind="GPT2LMHeadModel", **options):
    torch.manual_seed(1)
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=32, n_layer=2,
                           n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)
    return getattr(hf, kind)(config)


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def windows(rows):
    """Texts of different lengths: the end of each window is padding, which does not count. Nor does
    the first byte, which nothing predicts; whether the Trainer knows that depends on the model."""
    tokens = source_bytes(argparse, rows * WINDOW).view(rows, WINDOW)
    lengths = torch.linspace(8, WINDOW, rows).long()
    labels = tokens.masked_fill(torch.arange(WINDOW) >= lengths[:, None], -100)
    labels[:, 0] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels)]


def train(hf, folder, model, rows, *, trainer_class=None, loss=None, **options):
    """A run of the Trainer: (loss of each micro-batch, what the watch saw)."""
    curve = []

    class Recording(trainer_class or hf.Trainer):
        def training_step(self, *args, **kwargs):
            value = super().training_step(*args, **kwargs)
            curve.append(value.item())
            return value

    arguments = hf.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", seed=3,
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options)
    trainer = Recording(model, arguments, train_dataset=rows, compute_loss_func=loss)
    with Watch() as watch:
        trainer.train()
    return curve, watch


def shifted_loss(outputs, labels, num_items_in_batch=None):
    """The loss of a causal language model, without a copy of the logits."""
    logits = outputs.logits[:, :-1].transpose(1, 2)
    return wce_torch.cross_entropy(logits, labels[:, 1:], normalizer=num_items_in_batch)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_trainer_on_gpt2(hf, tmp_path, way, bf16):
    """With dropout: our loss draws no random numbers, so native's masks come again."""
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "bf16": bf16,
               "per_device_train_batch_size": 4, "learning_rate": 5e-3, "adam_epsilon": 1e-4}
    native = gpt2(hf)
    want, watch = train(hf, tmp_path, native, windows(40), **options)
    assert watch.saw_only_native()

    ours = gpt2(hf)
    with patched_if(way):
        loss = shifted_loss if way == "explicit" else None
        got, watch = train(hf, tmp_path, ours, windows(40), loss=loss, **options)
    assert watch.saw_only_ours(10)
    assert sum(want[-2:]) < 0.95 * sum(want[:2])  # it learns
    # The Trainer hands out float32 logits in either case, so the loss itself is float32.
    assert_same_curve(got, want, **(AUTOCAST if bf16 else FLOAT32))
    if not bf16:
        for mine, other in zip(ours.parameters(), native.parameters()):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def one_step(hf, folder, model, rows, processes=1, **options):
    """The gradient that a Trainer's step with gradient accumulation used, and the step's loss."""
    before = [p.detach().clone() for p in model.parameters()]
    curve, watch = train(
        hf, folder, model, rows, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1,
        lr_scheduler_type="constant", per_device_train_batch_size=2,
        gradient_accumulation_steps=len(rows) // (2 * processes), **options)
    return [b - p.detach() for b, p in zip(before, model.parameters())], curve, watch


def whole_batch(model, rows, loss):
    """The gradient and the loss of all rows at once, by torch's own loss."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model = copy.deepcopy(model).train()
    value = loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    value.backward()
    return [p.grad for p in model.parameters()], value.item()


def is_same_gradient(got, want):
    # The gradient is read from float32 parameters near 1, hence the absolute tolerance.
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, want))


def test_accumulated_tokens_equal_whole_batch(hf, tmp_path):
    """``compute_loss_func`` with ``normalizer=num_items_in_batch``; micro-batches differ in length
    by a factor of five, so means of means are far off."""
    model, rows = gpt2(hf, **NO_DROPOUT), windows(8)
    want, value = whole_batch(
        model, rows, lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()))
    got, curve, watch = one_step(hf, tmp_path, copy.deepcopy(model), rows, loss=shifted_loss)
    assert watch.saw_only_ours(4)
    assert is_same_gradient(got, want)
    assert sum(curve) == pytest.approx(value, rel=1e-5)

    def mean_of_means(outputs, labels, num_items_in_batch=None):
        return shifted_loss(outputs, labels) / 4

    wrong, _, _ = one_step(hf, tmp_path, model, rows, loss=mean_of_means)
    assert not is_same_gradient(wrong, want)


LABELS = torch.tensor([0, 0, 1, 0, 2, 2, -100, 1])
LABEL_WEIGHT = torch.tensor([0.5, 2.0, 11.0])


def labelled(hf):
    """A classifier of texts, and eight texts; the classes are rare and weigh differently."""
    tokens = source_bytes(textwrap, 8 * 16).view(8, 16)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, LABELS)]
    return gpt2(hf, "GPT2ForSequenceClassification", num_labels=3, **NO_DROPOUT), rows


def test_accumulated_rows_equal_whole_batch(hf, tmp_path):
    """The README's line for a classifier without class weights, as it stands there."""
    model, rows = labelled(hf)
    want, value = whole_batch(model, rows, F.cross_entropy)
    got, curve, watch = one_step(
        hf, tmp_path, model, rows,
        loss=lambda out, labels, num_items_in_batch=None: wce_torch.cross_entropy(
            out.logits, labels, None, normalizer=num_items_in_batch))
    assert watch.saw_only_ours(4)
    assert is_same_gradient(got, want)
    assert sum(curve) == pytest.approx(value, rel=1e-5)


def weighted_trainer(hf, weight=LABEL_WEIGHT, first=0):
    class WeightedTrainer(hf.Trainer):
        """Hands the loss the sum of the class weights in place of the number of labels."""

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            sums = (wce_torch.class_weight_sum(b["labels"][..., first:], weight) for b in batches)
            total = sum(sums, torch.zeros(()))
            return batches, self.accelerator.reduce(total.to(device), "sum")

    return WeightedTrainer


def weighted_loss(outputs, labels, num_items_in_batch=None):
    # Evaluation does not come through get_batch_samples, and takes one batch at a time.
    total = num_items_in_batch if torch.is_grad_enabled() else None
    return wce_torch.cross_entropy(outputs.logits, labels, LABEL_WEIGHT, normalizer=total)


def test_accumulated_weights_equal_whole_batch(hf, tmp_path):
    """With class weights the denominator is the sum of the weights, not the number of labels."""
    model, rows = labelled(hf)
    want, value = whole_batch(model, rows, lambda x, y: F.cross_entropy(x, y, LABEL_WEIGHT))
    got, curve, watch = one_step(hf, tmp_path, copy.deepcopy(model), rows, loss=weighted_loss,
                                 trainer_class=weighted_trainer(hf))
    assert watch.saw_only_ours(4)
    assert is_same_gradient(got, want)
    assert sum(curve) == pytest.approx(value, rel=1e-5)

    by_number, _, _ = one_step(hf, tmp_path, model, rows, loss=weighted_loss)
    assert not is_same_gradient(by_number, want)
    scale = wce_torch.class_weight_sum(LABELS, LABEL_WEIGHT) / (LABELS != -100).sum()
    assert is_same_gradient(by_number, [scale * g for g in want])


def test_accumulated_weights_of_a_language_model(hf, tmp_path):
    """Loss and denominator shift alike: the first label of a row has no weight in either."""
    model, rows = gpt2(hf, **NO_DROPOUT), windows(8)
    for row in rows:
        row["labels"][0] = 7  # not predicted, and not ignored either
    weight = torch.linspace(0.1, 9.0, VOCABULARY)

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].transpose(1, 2)
        return wce_torch.cross_entropy(logits, labels[:, 1:], weight, normalizer=num_items_in_batch)

    want, value = whole_batch(
        model, rows,
        lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), weight))
    got, curve, _ = one_step(hf, tmp_path, copy.deepcopy(model), rows, loss=loss,
                             trainer_class=weighted_trainer(hf, weight, first=1))
    assert is_same_gradient(got, want)
    assert sum(curve) == pytest.approx(value, rel=1e-5)
    _, curve, _ = one_step(hf, tmp_path, model, rows, loss=loss,
                           trainer_class=weighted_trainer(hf, weight))
    assert sum(curve) != pytest.approx(value, rel=1e-5)


def test_epoch_of_unknown_length_ends(hf, tmp_path):
    """An iterable dataset has no length, so the Trainer asks for batches once more at its end."""
    model, rows = labelled(hf)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    curve, watch = train(hf, tmp_path, model, Stream(), loss=weighted_loss, max_steps=5,
                         trainer_class=weighted_trainer(hf), per_device_train_batch_size=2,
                         gradient_accumulation_steps=2)
    assert len(curve) == 10 and watch.saw_only_ours(10)


def test_trainer_evaluates_with_weights(hf, tmp_path):
    model, rows = labelled(hf)
    _, value = whole_batch(model, rows, lambda x, y: F.cross_entropy(x, y, LABEL_WEIGHT))
    arguments = hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none",
                                     disable_tqdm=True, dataloader_pin_memory=False)
    trainer = weighted_trainer(hf)(model, arguments, eval_dataset=rows,
                                   compute_loss_func=weighted_loss)
    with Watch() as watch:
        metrics = trainer.evaluate()
    assert watch.calls == {"wce.forward": 1}
    assert metrics["eval_loss"] == pytest.approx(value, rel=1e-4)


def test_two_processes_equal_whole_batch(hf, tmp_path):
    """The same under DDP: two processes with two micro-batches each run the end of this file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]


def one_of_two_processes(folder):
    import transformers as hf

    model, rows = labelled(hf)
    want, value = whole_batch(model, rows, lambda x, y: F.cross_entropy(x, y, LABEL_WEIGHT))
    for trainer_class, is_right in ((weighted_trainer(hf), True), (None, False)):
        got, curve, watch = one_step(
            hf, folder, copy.deepcopy(model), rows, loss=weighted_loss,
            trainer_class=trainer_class, ddp_backend="gloo", processes=2)
        assert torch.distributed.get_world_size() == 2
        assert watch.saw_only_ours(2)
        assert is_same_gradient(got, want) == is_right
        # DDP averages: the sum over micro-batches and processes is twice the loss.
        losses = torch.tensor(sum(curve))
        torch.distributed.all_reduce(losses)
        assert (losses.item() / 2 == pytest.approx(value, rel=1e-5)) == is_right
    (folder / f"done{torch.distributed.get_rank()}").touch()


# ---- Lightning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning():
    return package("lightning")


CONTEXT = 8


def next_bytes():
    """Eight bytes of a text and the one after them, in batches of 64; class weights that make rare
    bytes matter more, within a range of 100."""
    text = source_bytes(textwrap, 64 * 12 + CONTEXT).clamp(max=127)
    x = text.unfold(0, CONTEXT, 1)[:-1]
    y = text[CONTEXT:]
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    weight = (text.numel() / (text.bincount(minlength=128) + 10.0)) / 10
    return batches, weight.clamp(max=10.0)


def fit(lightning, folder, precision, loss):
    """A run of Lightning: (module, losses, losses in float64 for the same logits, watch)."""

    class NextByte(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.embed = nn.Embedding(128, 16)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(16 * CONTEXT, 64), nn.ReLU(),
                                      nn.Linear(64, 128))
            self.loss = loss
            self.curve, self.exact = [], []

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.body(self.embed(x))
            value = self.loss(logits, y)
            self.logits_dtype, self.loss_dtype = logits.dtype, value.dtype
            self.curve.append(value.item())
            self.exact.append(self._exact(logits, y))
            return value

        def _exact(self, logits, y):
            # By hand: another call of the loss would be counted.
            rows = torch.arange(len(y))
            x = logits.detach().double()
            w = self.loss.weight.double()[y]
            return (w * (x.logsumexp(1) - x[rows, y])).sum().item() / w.sum().item()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = NextByte()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision=precision, max_steps=12, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder))
    with Watch() as watch:
        trainer.fit(module, next_bytes()[0])
    return module, watch


@pytest.mark.parametrize("way", WAYS)
def test_lightning_bf16_mixed(lightning, tmp_path, way):
    weight = next_bytes()[1]
    full, _ = fit(lightning, tmp_path, "32-true", nn.CrossEntropyLoss(weight=weight))
    native, watch = fit(lightning, tmp_path, "bf16-mixed", nn.CrossEntropyLoss(weight=weight))
    assert watch.saw_only_native()
    with patched_if(way):
        ours, watch = fit(lightning, tmp_path, "bf16-mixed", loss_class(way)(weight=weight))
    assert watch.saw_only_ours(12)
    assert ours.logits_dtype == torch.bfloat16 and ours.loss_dtype == torch.float32
    assert full.curve[-1] < 0.9 * full.curve[0]  # it learns
    assert_same_curve(ours.curve, native.curve, **AUTOCAST)
    assert_same_curve(ours.curve, full.curve, rtol=4 * BF16_ROUNDING, atol=0.0)
    # The loss itself is float32 arithmetic on the bfloat16 logits.
    assert_same_curve(ours.curve, ours.exact, **FLOAT32)

    assert list(ours.state_dict()) == list(native.state_dict())
    assert "loss.weight" in ours.state_dict()
    native.load_state_dict(ours.state_dict())
    ours.load_state_dict(native.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_lightning_bf16_true(lightning, tmp_path, way):
    """Without autocast all is bfloat16. Ours computes in float32 and rounds the loss once; native
    rounds log-probabilities, products, sums and the quotient, so each curve is compared with
    float64 on its own logits, and native's gets room for those roundings."""
    weight = next_bytes()[1]
    native, watch = fit(lightning, tmp_path, "bf16-true", nn.CrossEntropyLoss(weight=weight))
    assert watch.saw_only_native()
    with patched_if(way):
        ours, watch = fit(lightning, tmp_path, "bf16-true", loss_class(way)(weight=weight))
    assert watch.saw_only_ours(12)
    assert ours.loss_dtype == torch.bfloat16
    assert_same_curve(ours.curve, ours.exact, rtol=1.01 * BF16_ROUNDING, atol=0.0)
    assert_same_curve(native.curve, native.exact, rtol=8 * BF16_ROUNDING, atol=0.0)
    assert_same_curve(ours.curve, native.curve, rtol=16 * BF16_ROUNDING, atol=0.0)


# ---- MONAI ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monai():
    module = package("monai")
    package("monai.losses")
    package("monai.networks.nets")
    return module


CLASSES, SIDE = 3, 16


def volumes():
    """Two noisy volumes (2, 1, D, H, W), each with a ball (1) and a smaller ball in it (2)."""
    torch.manual_seed(4)
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij")).float()
    centres = torch.tensor([[6.0, 8.0, 7.0], [9.0, 7.0, 8.0]]).view(2, 3, 1, 1, 1)
    distance = (grid - centres).norm(dim=1)
    labels = (distance < 6).long() + (distance < 3).long()
    image = labels + 0.3 * torch.randn(labels.shape)
    return image[:, None], labels[:, None]


def segment(monai, loss, image, labels, memory_format=torch.contiguous_format):
    """Five steps of a small 3-D UNet: (losses, parameters, what the watch saw)."""
    torch.manual_seed(5)
    net = monai.networks.nets.UNet(spatial_dims=3, in_channels=1, out_channels=CLASSES,
                                   channels=(4, 8), strides=(2,), num_res_units=1)
    net = net.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    curve = []
    with Watch() as watch:
        for _ in range(5):
            optimizer.zero_grad()
            value = loss(net(image.to(memory_format=memory_format)), labels)
            value.backward()
            optimizer.step()
            curve.append(value.item())
    return curve, list(net.parameters()), watch


def dice_ce(monai, way, **options):
    weight = torch.tensor([0.2, 1.0, 5.0])
    loss = monai.losses.DiceCELoss(softmax=True, weight=weight, **options)
    if way == "explicit":
        smoothing = options.get("label_smoothing", 0.0)
        loss.cross_entropy = wce_torch.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    return loss


@pytest.mark.parametrize("labels_are, memory_format", [
    ("classes", torch.contiguous_format),
    ("classes", torch.channels_last_3d),
    ("smoothed classes", torch.contiguous_format),
    ("one-hot", torch.channels_last_3d),
], ids=["classes", "channels last", "smoothed", "one-hot"])
@pytest.mark.parametrize("way", WAYS)
def test_monai_dice_ce(monai, way, labels_are, memory_format):
    image, labels = volumes()
    options = {"to_onehot_y": True}
    if labels_are == "smoothed classes":
        options["label_smoothing"] = 0.1
    elif labels_are == "one-hot":
        options["to_onehot_y"] = False
        labels = F.one_hot(labels[:, 0], CLASSES).movedim(-1, 1)

    want, others, watch = segment(monai, dice_ce(monai, "native", **options), image, labels,
                                  memory_format)
    assert watch.saw_only_native()
    with patched_if(way):
        got, mine, watch = segment(monai, dice_ce(monai, way, **options), image, labels,
                                   memory_format)
    assert watch.saw_only_ours(5)
    assert want[-1] < 0.95 * want[0]  # it learns
    assert_same_curve(got, want, **FLOAT32)
    for a, b in zip(mine, others):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_monai_meta_tensors(monai, way):
    """MONAI's transforms hand out a subclass of Tensor. Whichever path that takes, ``explain`` says
    so, and curve and type are native's."""
    image, labels = (monai.data.MetaTensor(t) for t in volumes())
    want, _, _ = segment(monai, dice_ce(monai, "native", to_onehot_y=True), image, labels)
    with patched_if(way):
        loss = dice_ce(monai, way, to_onehot_y=True)
        got, _, watch = segment(monai, loss, image, labels)
        logits = monai.data.MetaTensor(torch.randn(2, CLASSES, SIDE, SIDE, SIDE))
        value = loss.cross_entropy(logits, labels[:, 0])
        path, reason = wce_torch.explain(logits, labels[:, 0])
    assert isinstance(value, monai.data.MetaTensor)
    assert_same_curve(got, want, **FLOAT32)
    if path == "fused":
        assert watch.saw_only_ours(5)
    else:
        assert path == "native" and "MetaTensor" in reason
        assert watch.saw_only_native()


if __name__ == "__main__":
    one_of_two_processes(pathlib.Path(sys.argv[1]))

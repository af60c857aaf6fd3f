"""Train the slide's other generative models by maximum likelihood (slide "Various generative models").

python train_likelihood.py --model vae                     # variational autoencoder, on MNIST
python train_likelihood.py --model rnn --dataset digits    # recurrent network, without a download
python train_likelihood.py --model rbm                     # restricted Boltzmann machine
python train_likelihood.py --model hmm --states 512        # hidden Markov model
python train_likelihood.py --resume runs/vae-mnist         # continue where it stopped
"""

import torch

import utils
from datasets import DATASETS, Batches, binarise, class_names, hold_out, load, short_name
from datasets.binarise import TRAIN_SEED, VALIDATION_SEED
from engine import distributed, flags, optim
from engine.device import pick_device
from engine.errors import UserError, run_script
from models import LIKELIHOOD_MODELS, build_likelihood_model

RECIPES = {
    "lecture": dict(batch_size=100, schedule="cosine", val_size=0),  # minutes on two CPU cores
    "best": dict(batch_size=100, schedule="cosine", val_size=0),
    "paper": dict(val_size=0),
}
VARIANTS = {
    ("lecture", "vae"): dict(epochs=50, lr=4e-3),
    ("lecture", "rbm"): dict(epochs=30, optimizer="sgd", lr=0.3, persistent_chains=100, ema=0.999),
    ("lecture", "rnn"): dict(epochs=5, lr=0.012, hidden=128, ema=0.999),
    ("lecture", "hmm"): dict(epochs=4, lr=0.1, states=256),
    ("best", "vae"): dict(epochs=1000, batch_size=50, lr=1e-3, eps=1e-4, ema=0.999),
    ("best", "rbm"): dict(epochs=60, optimizer="sgd", lr=0.2, persistent_chains=100, gibbs_steps=5, ema=0.999),
    ("best", "rnn"): dict(epochs=12, lr=0.01, hidden=256, depth=2, ema=0.999),
    ("best", "hmm"): dict(epochs=8, lr=0.1, states=512),
    # Burda et al. 2015, section 5: 3,280 epochs at batch 20, Adam with eps 1e-4.
    ("paper", "vae"): dict(epochs=3280, batch_size=20, lr=1e-3, eps=1e-4, schedule="burda"),
    # Salakhutdinov & Murray 2008, section 5: 500 hidden units, CD-25.
    ("paper", "rbm"): dict(epochs=300, batch_size=100, optimizer="sgd", lr=0.05, gibbs_steps=25, binarise="fixed"),
    ("lecture", "digits"): dict(epochs=100),
    ("best", "digits"): dict(epochs=200),
}


def get_args_parser():
    parser = flags.shared_args_parser("train_likelihood.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    add, number = parser.add_argument, flags.number
    add("--model", choices=list(LIKELIHOOD_MODELS), default="vae", help="network")
    add(
        "--binarise", choices=["dynamic", "fixed", "none"], default="dynamic", help="draw pixels at each visit, or once"
    )
    add("--schedule", choices=["constant", "cosine", "burda"], default="constant", help="learning rate over time")
    add("--hidden", type=number(int, 1), help="hidden units (vae, rbm, rnn)")
    add("--importance-samples", type=number(int, 1), help="k of the IWAE bound (vae)")
    add("--gibbs-steps", type=number(int, 1), help="k of CD-k (rbm)")
    add("--persistent-chains", type=number(int, 0), help="chains of persistent CD; 0 is CD (rbm)")
    add("--depth", type=number(int, 1), help="layers within a row (rnn)")
    add("--states", type=number(int, 1), help="hidden states (hmm)")
    return parser


def build(args, device, batches):
    """The objects to train, by name, the step that trains them, and the network that is the result."""
    try:
        model = build_likelihood_model(vars(args), batches.pixel_means().cpu()).to(device)
    except ValueError as error:
        raise UserError(error) from error
    optimizer = optim.build_optimizer(args, model.parameters())
    state = optim.training_state(args, model, optimizer, len(batches))

    def train_step(images, labels):
        if args.binarise == "dynamic":
            images = torch.bernoulli(images)  # each pixel is white with probability grey / 255, drawn at each visit
        loss = model.loss(images)  # -log p(x) in nats per image, or what stands for it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return state, train_step, state["ema"].model if "ema" in state else model


def main(argv=None):
    args = flags.parse_args(get_args_parser(), RECIPES, VARIANTS, argv)
    if args.recipe == "paper" and args.model not in ("vae", "rbm"):
        raise UserError(f"--recipe paper: no published recipe for --model {args.model}; use lecture or best")
    device = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)
    args.classes = distributed.broadcast(lambda: class_names(args.dataset, args.data_dir, args.resume and args.classes))
    (images, labels), (val_images, _) = hold_out(
        *distributed.rank_0_first(lambda: load(args.dataset, args.data_dir)), args.val_size
    )
    if args.binarise == "fixed":
        images = binarise(images, TRAIN_SEED)
    batches = Batches(images, labels, args.batch_size, device, black=0.0, seed=args.seed)
    val_images = (binarise(val_images, VALIDATION_SEED) / 255).to(device) if args.val_size else None
    state, train_step, network = build(args, device, batches)

    def validate():
        if not args.val_size:
            return {}
        with utils.evaluating(network):
            quick = getattr(network, "quick", {})  # less work than evaluate.py's estimate, which may take minutes
            return {"val_log_likelihood": network.log_likelihood(val_images, **quick).mean().item()}

    def draw():
        with utils.evaluating(network):
            return network.sample(100, torch.Generator(device).manual_seed(args.seed))

    run = utils.Run(args, state, name=f"{args.model}-{short_name(args.dataset)}")
    return utils.train(run, train_step, batches, validate, "val_log_likelihood", draw)


if __name__ == "__main__":
    run_script(main)

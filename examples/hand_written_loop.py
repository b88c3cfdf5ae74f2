"""GRPO in a loop of one's own, without a Trainer. Only --strategy changes with the back end.

A tiny Llama with random weights learns to repeat the digit that it is shown: "7=" is to be followed by "7777".
Run it again with --resume to go on from its checkpoint, under any strategy; start it with `torchrun` for several ranks.
"""

import argparse

import torch

from lightrft_lightning import Prompt, SamplingParams, Trajectory, get_strategy
from lightrft_lightning.algorithms import advantages, kl_penalty, policy_loss
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--strategy", default="lightrft_fake", help="a registered name")
parser.add_argument("--engine_type", default="transformers", help="what generates")
parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
parser.add_argument("--train_batch_size", type=int, default=160, help="completions of one optimizer step")
parser.add_argument("--micro_train_batch_size", type=int, default=80, help="completions of one backward pass")
parser.add_argument("--actor_learning_rate", type=float, default=3e-3, help="of AdamW")
parser.add_argument("--iterations", type=int, default=30, help="rollouts of one optimizer step")
parser.add_argument("--save_dir", default="runs/hand_written_loop", help="folder of checkpoints")
parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint there")
args = parser.parse_args()

torch.set_num_threads(1)  # more would only wait for each other: the model is tiny
strategy = get_strategy(args)
strategy.setup_distributed()
tokenizer, (actor, reference) = char_tokenizer(), (tiny_llama(args.seed, layers=2, width=64) for _ in range(2))
optimizer = strategy.create_optimizer(actor)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
(actor, optimizer, scheduler), reference = strategy.prepare((actor, optimizer, scheduler), reference, is_rlhf=True)
strategy.setup_inference_engine(actor=actor, tokenizer=tokenizer)
done = strategy.load_ckpt(actor, args.save_dir)[1]["iterations"] if args.resume else 0
prompts = [Prompt(tuple(tokenizer(text)["input_ids"]), text) for text in (f"{digit}=" for digit in range(10))]
loader = strategy.setup_dataloader(prompts * args.iterations, 10 // strategy.world_size, consumed_samples=10 * done)
for iteration, batch in enumerate(loader, start=done + 1):
    sampling = SamplingParams(n=args.train_batch_size // 10, max_new_tokens=4, seed=args.seed * 10**6 + iteration)
    groups = strategy.gather_and_generate(sampling, all_prompt_token_ids=[p.token_ids for p in batch])
    samples = [Trajectory(batch[i], completion, group=i) for i, group in enumerate(groups) for completion in group]
    rewards = [sum(token == t.prompt.token_ids[0] for token in t.completion.token_ids) / 4 for t in samples]
    values = advantages("group_norm", rewards, [t.group for t in samples]).advantages.tolist()
    for start in range(0, len(samples), args.micro_train_batch_size):
        chosen = slice(start, start + args.micro_train_batch_size)
        (rows,) = pack(samples[chosen], token_budget=100_000)
        logprobs = completion_logprobs(actor, rows).logprobs
        old = rows.pack_values([t.completion.logprobs for t in samples[chosen]])
        gain = torch.tensor(values[chosen])[rows.trajectory]
        loss = policy_loss("ppo", logprobs, old, gain, torch.ones_like(old), sequence=rows.trajectory).loss
        kl = kl_penalty("k3", logprobs, completion_logprobs(reference, rows).logprobs).mean()
        strategy.backward(loss + 0.001 * kl, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler, name="actor")
    reward = sum(strategy.all_reduce(rewards)) / len(rewards)
    if iteration % 5 == 0 or iteration == 1:
        strategy.print(f"{iteration=:3d} {reward=:.3f} kl={kl:.3f} norm={strategy.grad_norms['actor']:.2f}")
strategy.print("saved", strategy.save_ckpt(actor, args.save_dir, client_state={"iterations": iteration}))

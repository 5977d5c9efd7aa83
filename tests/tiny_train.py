"""What timm's train.py does, from the same parts of timm, where that script is not at hand (it is in no release)."""
import argparse
import sys

import torch
from timm import utils
from timm.data import Mixup, create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

parser = argparse.ArgumentParser()
for name, kind in (
        ('data-dir', str), ('model', str), ('batch-size', int), ('epochs', int), ('lr', float), ('seed', int),
        ('workers', int), ('drop', float), ('drop-path', float), ('mixup', float), ('train-crop-mode', str),
        ('output', str), ('experiment', str), ('resume', str)):
    parser.add_argument(f'--{name}', type=kind)
args, _ = parser.parse_known_args()
args.distributed = False
utils.random_seed(args.seed)
model = create_model(args.model, num_classes=2, drop_rate=args.drop, drop_path_rate=args.drop_path)
task = ClassificationTask(model, lambda x, y: torch.sum(-y * x.log_softmax(-1), -1).mean())
optimizer = create_optimizer_v2(model, 'nesterov', args.lr, weight_decay=1e-4)
start = resume_task_checkpoint(task, args.resume, optimizer) if args.resume else 0
task.setup_ema(decay=0.9)
if args.resume:
    load_task_ema_checkpoint(task, args.resume)
loader = create_loader(
    create_dataset('', args.data_dir, split='train', is_training=True), input_size=(3, 16, 16),
    batch_size=args.batch_size, is_training=True, train_crop_mode=args.train_crop_mode, num_workers=args.workers,
    use_prefetcher=False, device='cpu')
mixup = Mixup(args.mixup, num_classes=2)
scheduler, _ = create_scheduler_v2(
    optimizer, num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=len(loader))
saver = utils.CheckpointSaver(
    model, optimizer, args, task=task, decreasing=True, max_history=5,
    checkpoint_dir=utils.get_outdir(args.output, args.experiment))
scheduler.step_update(start * len(loader))
for epoch in range(start, args.epochs):
    loader.dataset.set_epoch(epoch)
    model.train()
    for i, (images, targets) in enumerate(loader):
        loss = task(*mixup(images, targets))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates = epoch * len(loader) + i + 1
        task.update_ema(step=updates)
        scheduler.step_update(updates)
    saver.save_checkpoint(epoch, metric=loss.item())
    scheduler.step(epoch + 1)
sys.exit(0)

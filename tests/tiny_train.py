"""What timm's train.py does, from the same parts of timm, where that script is not at hand (it is in no release)."""
import argparse

import torch
from timm import utils
from timm.data import Mixup, create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

parser = argparse.ArgumentParser()
for name in ('data-dir', 'model', 'output', 'experiment', 'resume'):
    parser.add_argument(f'--{name}')
args, _ = parser.parse_known_args()
args.distributed = False
utils.random_seed(3)
model = create_model(args.model, num_classes=2, drop_rate=0.2, drop_path_rate=0.2)
task = ClassificationTask(model, lambda x, y: torch.sum(-y * x.log_softmax(-1), -1).mean())
optimizer = create_optimizer_v2(model, 'nesterov', 0.05, weight_decay=1e-4)
start = resume_task_checkpoint(task, args.resume, optimizer) if args.resume else 0
task.setup_ema(decay=0.9)
if args.resume:
    load_task_ema_checkpoint(task, args.resume)
loader = create_loader(
    create_dataset('', args.data_dir, split='train', is_training=True), input_size=(3, 16, 16), batch_size=8,
    is_training=True, train_crop_mode='pad4', num_workers=1, use_prefetcher=False, device='cpu')
mixup = Mixup(0.4, num_classes=2)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=3, step_on_epochs=False, updates_per_epoch=len(loader))
saver = utils.CheckpointSaver(
    model, optimizer, args, task=task, decreasing=True, max_history=5,
    checkpoint_dir=utils.get_outdir(args.output, args.experiment))
scheduler.step_update(start * len(loader))
for epoch in range(start, 3):
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

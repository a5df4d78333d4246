"""Small runs of the commands that give every option another value than its default.

A run is one or more lines, called one after the other in their own folder. The text after "=>" is
printed, or is in a text file that a line wrote. Add a new option to a line, or a new line for it.

    {images}    a folder of 16 x 16 pixels in two classes, 40 training and 16 validation images
    {others}    a folder of eight other images
    {run}       a trained VI-SimSiam run
    {moved}     the same, with images that are no longer at their place: it needs --data
    {simsiam}   a trained SimSiam run
    {resnet}    an untrained run with a ResNet, whose images are not there
    {settings}  a YAML file of settings
    {here}      the folder of this run; {out} is in it, and does not exist yet
"""

from __future__ import annotations

SMALL = (
    "--data {images} --epochs 1 --batch-size 8 --dim 16 --projector-hidden 16 "
    "--predictor-hidden 16 --size 16 --device cpu --workers 0"
)
"""A training of five steps."""
_TRAIN = f"train {SMALL} --out {{out}}"
_MOVED = (
    "{moved} --device cpu --workers 0 --data {images} --data-root {here} --cache-dir {here}/cache"
)
_APPLIED = (
    "{run} {images} --device cpu --workers 1 --views 2 --seed 1 --batch-size 4 "
    "--data-root {here} --offline"
)
_VIEWS = (
    "--size 16 --crop-scale 0.5 0.9 --crop-ratio 0.8 1.2 --jitter 0.1 0.2 0.3 0.05 "
    "--jitter-prob 0.5 --grayscale-prob 0.1 --blur-prob 0.3 --blur-sigma 0.2 1 --flip-prob 0.1 "
    "--local-views 1 --local-size 8 --local-scale 0.1 0.3"
)
_DECODE = "--background white --value-range 0 4095 --frames all"
_CHANNELS = "--channels 3 --bits 16 --mean 0.5 0.4 0.3 --std 0.2 0.2 0.1"
_BENCH = "--device cpu --short --rounds 3 --out {here}"
_FURTHER = (
    "experiment further --data {images} --preset demo --seeds 1 --epochs 1 --size 16 --images 24 "
    "--val-images 8 --arms starting --devices cpu --data-root {here} --cache-dir {here}/cache"
)

RUNS = {
    "train simsiam": f"""
        {_TRAIN} --method simsiam --seed 3 --lr 0.05 --momentum 0.5 --weight-decay 0.001 \
            --warmup-epochs 0.5 --clip-norm 1 --ema 0.9 --precision bf16 --batch-norm joint \
            --backend eager --loss-scale 2 --log-every 1 --save-every 0 --keep 1 --deterministic \
            --quiet => "step": 1,""",
    "train on a part": f"""
        {_TRAIN} --images 24 --held-out 0.25 --split-seed 1 --distinct --data-root {{here}} \
            --offline --cache-dir {{here}}/cache --knn-every 1 --stop-on collapse --evaluate \
            => linear top-1""",
    "train views": f"""
        {_TRAIN} {_VIEWS} {_DECODE} --local-predictor --stem small --concentration-link softplus \
            --concentration-scale 5 --concentration-min 0.1 --concentration-max 100 \
            --cosine-weight 0.5""",
    "train channels": f"""
        {_TRAIN} {_CHANNELS} => views: 3 channels of 16 bits""",
    "train controls": f"""
        {_TRAIN} --concentration constant --concentration-value 5 => kappa/(D-1) 5
        {_TRAIN} --overwrite --concentration detached --concentration-gain 2 --capture off \
            --kernels off --data-memory host""",
    "train compiled": f"""
        {_TRAIN} --compile --accumulate 2 --log trackio => cos""",
    "train pretrained": f"""
        {_TRAIN} --backbone resnet34 --pretrained
        fit-kappa resnet34 --data {{images}} --pretrained --out {{out}} --overwrite --size 16 \
            --views 2 --epochs 1 --device cpu --workers 0 => "views": 2
        {_FURTHER} --backbone resnet34 --pretrained --out {{out}}/further => "pretrained": true""",
    "train from weights": f"""
        {_TRAIN} --init {{simsiam}} => init: 6 of the backbone's 6 tensors""",
    "train settings": f"""
        {_TRAIN} --preset demo --config {{settings}} --policy multicrop --local-size 8 \
            => "momentum": 0.75""",
    "train again": """
        train --out {run} --resume => nothing is left to train""",
    "train seeds": f"""
        {_TRAIN} --seeds 1 => seed 0: done""",
    "evaluate": f"""
        evaluate {_MOVED} => kNN top-1""",
    "knn": f"""
        knn {_MOVED} --k 3 --temperature 0.5 => "k": 3""",
    "linear": f"""
        linear {_MOVED} --preset paper => held-out""",
    "logistic": f"""
        logistic {_MOVED} --c 0.5 => "c": 0.5""",
    "figures": f"""
        figures {_MOVED} => kappa.png""",
    "uncertainty": f"""
        uncertainty {_MOVED} --ood far={{others}} --images 8 --corruption-images 2 --seed 1 \
            => "corruption_images": 2""",
    "doctor": f"""
        {_TRAIN} --lr 1e30 => "checkpoint_step": 0
        doctor {{out}} --replay --device cpu --workers 0 --data {{images}} --data-root {{here}} \
            --cache-dir {{here}}/cache => its views: """,
    "report": f"""
        report {_MOVED} => report.html""",
    "embed": f"""
        embed {_APPLIED} --neighbours 2 --reference {{others}} --checkpoint best \
            --out {{out}}.parquet => 56 images
        embed {{run}} {{others}} --overwrite --out {{out}}.parquet => 8 images""",
    "rank": f"""
        rank {_APPLIED} -k 2 --checkpoint best --out {{out}} => 56 images
        rank {{run}} {{others}} --k 3 --by mahalanobis --overwrite --out {{out}} => 8 images""",
    "clean": """
        clean {images} --encoder {run} --out {out} --checkpoint best --similarity 0.8 \
            --batch-size 4 --device cpu --workers 1 --data-root {here} --offline => 56 images read
        clean {others} --encoder {run} --out {out} --overwrite => 8 images read""",
    "export": """
        export {resnet} --format timm --data {images} --data-root {here} --out {out} \
            => checked on 8 images of images
        export {resnet} --format timm --overwrite --checkpoint best --out {out} \
            => checked on fashion-mini""",
    "push-to-hub": """
        push-to-hub {resnet} somebody/photos --format timm --private --checkpoint best \
            --data {images} --data-root {here} => published: https://huggingface.co/somebody/photos""",
    "pack": f"""
        pack {{images}} --out {{out}}.pack --shorter-side 12 --workers 1 --data-root {{here}} \
            --offline => about 17.3 kB
        pack {{images}} --channels 3 --bits 16 --out {{out}}16.pack => about 61.4 kB
        pack {{images}} --out {{out}}.pack --overwrite {_DECODE} => about 30.7 kB""",
    "fit-kappa": """
        fit-kappa {run} --data {images} --images 24 --out {out} --size 16 --views 2 --epochs 1 \
            --seed 1 --device cpu --workers 0 --data-root {here} --offline \
            --cache-dir {here}/cache => calibration on views of images held out
        fit-kappa resnet18 --init {simsiam} --data {images} --out {out} --overwrite --size 16 \
            --views 2 --epochs 1 --device cpu --workers 0 => init: 6 of the backbone's 6""",
    "views": f"""
        views --data {{images}} {_VIEWS} {_DECODE} --policy multicrop --images 2 --seed 1 \
            --data-root {{here}} --offline --out {{out}}.png
        views --data {{images}} --size 16 {_CHANNELS} --images 2 --out {{out}}-16.png""",
    "info": """
        info --check --json => "name": "training step, float32",""",
    "bench loss": f"""
        bench loss {_BENCH} --only 64x512 => written: {{here}}/cpu/multiview_loss.json
        bench loss {_BENCH} --only 64x512 --resume""",
    "bench batch_norm": f"""
        bench batch_norm {_BENCH} --only 128@4 => written: {{here}}/cpu/batch_norm.json
        bench batch_norm {_BENCH} --only 128@4 --resume""",
    "bench augment": f"""
        bench augment {_BENCH} --only 2x16 --workers 1 --data folder:{{others}} => "workers": 1
        bench augment {_BENCH} --only 2x16 --workers 1 --resume""",
    "bench step": f"""
        bench step {_BENCH} --only vi-simsiam --kernels => "method": "vi-simsiam"
        bench step {_BENCH} --only vi-simsiam --resume""",
    "bench train": f"""
        bench train {_BENCH} --only plain --data {{images}} --data-root {{here}} --images 16 \
            --size 16 --local-views 1 --local-size 8 --batch-size 8 --epochs 2 --lr 0.02 --workers \
            0 --target-accuracy 0.1 --resume => 2x16+1x8, batch 8""",
    "bench record": """
        bench record --record tiny --change base --seeds 1 --first-seed 2 --data {images} \
            --data-root {here} --device cpu --out {here} => "seed": 2,""",
    "bench accuracy": """
        bench accuracy --device cpu --out {here} => 1,000,000""",
    "bench clean": """
        bench clean --data folder:{images} --encoder {run} --foreign folder:{others} --images 40 \
            --seeds 1 --device cpu --out {here} => written: {here}/cpu/clean.json""",
    "experiment": """
        experiment controls --data {images} --preset demo --seeds 1 --epochs 1 --size 16 \
            --batch-size 8 --dim 16 --arms byol --ema 0.9 --images 24 --val-images 8 --devices cpu \
            --parallel 2 --threads 1 --workers 1 --data-root {here} --offline --cache-dir \
            {here}/cache --out {out} => momentum 0.9""",
    "experiment further": f"""
        {_FURTHER} --init {{simsiam}} --ood near={{others}} --out {{out}} => "near":""",
}

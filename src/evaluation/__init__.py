"""Scoring reconstructions: what the training callback and the command line programs share. Protocol: design §6.

Originals are ADM centre crops, reconstructions carry no latent noise unless asked for; both are compared as 8-bit
images.

The published figures of the released DINOv2-B decoder on ImageNet val (rFID .57, PSNR 18.9 dB; recipe §7) come from

    python src/eval_rfid.py --decoder DECODER.pt --encoder_cls Dinov2withNorm \
        --encoder facebook/dinov2-with-registers-base --stats STATISTICS.pt --decoder_config configs/decoder/ViTXL \
        --data_dir /path/to/imagenet_hf --split validation --num_samples 50000 --image_size 256 \
        --exif ignore --quantization truncate

where DECODER.pt is the release's `decoders/dinov2/wReg_base/ViTXL_n08/model.pt` and STATISTICS.pt its
`stats/dinov2/wReg_base/imagenet1k/stat.pt`. The last line is what the published protocol does otherwise than ours: EXIF
rotation is ignored and 8-bit values are cut off instead of rounded.
"""

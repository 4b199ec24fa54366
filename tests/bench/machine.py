"What a figure was measured on"
import platform
from pathlib import Path

import torch

def machine() -> str:
    "Processor, threads, GPU and PyTorch, in a line"
    cpu = Path('/proc/cpuinfo')
    lines = cpu.read_text(encoding='utf-8').splitlines() if cpu.exists() else []
    name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.processor())
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return f'{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}'

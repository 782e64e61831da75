"""``python -m admtrt``, for launchers such as ``torchrun -m admtrt``."""

from admtrt.cli import main

if __name__ == "__main__":
    main()

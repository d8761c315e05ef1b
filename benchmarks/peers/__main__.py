"""`python -m benchmarks.peers MODEL`, from the root of the repository."""

from benchmarks.peers.command import main

if __name__ == "__main__":
    main()

"""Who decides the dropout masks of a discriminator.

`nn.Dropout` takes its masks from torch's global random numbers. `seeded_masks` lends those a seed for the length of a
`with`, so that the caller decides the masks and the process's own random numbers stay as they were.

Why dropout keeps the privacy of a clipped sum. Let M be the joint masks of all images of a step, and f_m the clipped
sum plus noise, given that M = m. Masks are independent from image to image and of every image's content. Compare a run
on a data set with one on its neighbour, which has one unit more, and couple them so that the units in common wear
equal masks: given those masks each common unit contributes the same to both sums, and the unit that is missing from
one contributes a vector of norm at most C, whatever masks it wears. So given m the two outputs are as close as those
of the mechanism without dropout, and the released output is a mixture of the f_m with the same mixing law on both
sides: a mixture is no further apart than its worst part (hockey-stick and Renyi divergences are jointly (quasi-)convex),
and the step is exactly as private as one without dropout.

The coupling exists because the seed is **secret and fresh for each step** (a client takes it from SecureRandom), which
makes the masks random to everyone else and independent of the data. torch's own seeding takes 32 bits on a
processor, so few that whoever knows all photographs but one can try every seed on what was released: here the whole state
of the Mersenne Twister is filled from the seed by SHAKE-256 (NIST FIPS 202). That generator is not a cryptographic one, as
that of the noise is, and on a GPU (Philox) it takes 64 bits: the claim holds against whoever cannot tell its masks from
ideal ones. With a public or repeated seed it fails altogether: the mask of the k-th image is then a known function of k,
one image more moves every later image on to another mask, and the sum may change by as much as all of them together.

On generated images no privacy is at stake: there the coordinator takes the seed from its state's generator, so that a
resumed run repeats it.

Rows that book-keeping pads a batch with wear masks too; they are drawn for no image, enter no sum, and at most change
which masks the images of a later chunk get: still independent of the data's content.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Words of 32 bits in the state of a Mersenne Twister.
_WORDS = 624


@contextmanager
def seeded_masks(seed: bytes) -> Iterator[None]:
    """Within the `with`, torch's global random numbers, and so dropout's masks, follow `seed` on every device;
    afterwards they are what they were.

    seed: any bytes. For private data 32 of them or more, secret and fresh for each step (see the module's docstring). The
    masks also depend on the batch's shape and on how it is cut into chunks. Two threads must not be inside at once.
    """
    digest = hashlib.shake_256(seed).digest(4 * _WORDS + 8)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.set_rng_state(_twister_state(digest[:-8]))
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(int.from_bytes(digest[-8:], "little") >> 1)
        yield


def _twister_state(words: bytes) -> torch.Tensor:
    """The state of torch's generator on the processor with these words, little-endian, for its own."""
    state = torch.Generator().manual_seed(0).get_state()
    # After the seed and three counters, each word in the place of eight bytes; a test compares NumPy's twister.
    state.numpy().view(np.uint64)[3 : 3 + _WORDS] = np.frombuffer(words, dtype="<u4")
    return state

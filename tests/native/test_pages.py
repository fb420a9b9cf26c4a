"""Pages of keys and values: written in place, shared until written, given back."""

import copy
import pickle

import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native.pages import PAGE, Pages

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


def tokens(count, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 32, generator=g), torch.randn(batch, 3, count, 64, generator=g)


def filled(count, kind="f32", batch=2):
    pages = Pages(kind, 3, 32, 64)
    keys, values = tokens(count, batch)
    pages.append(keys, values)
    return pages, keys, values


@pytest.mark.parametrize(("kind", "limit"), [("f32", 0), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_gives_back_what_was_appended(kind, limit):
    pages, keys, values = filled(70, kind)
    more = tokens(60, seed=1)
    pages.append(*more)
    for found, parts in zip(pages.gathered(), ((keys, more[0]), (values, more[1])), strict=True):
        torch.testing.assert_close(found.float(), torch.cat(parts, 2), rtol=limit, atol=limit * 4)
    assert pages.length == 130 and pages.nbytes == 2 * 3 * pages.page_bytes
    torch.testing.assert_close(pages.gathered(100)[0].float(), more[0][:, :, 30:], rtol=limit, atol=limit * 4)


def test_a_page_is_never_moved():
    pages, _, _ = filled(1)
    places = [table[0].data.data_ptr() for table in pages.tables]
    for i in range(200):
        pages.append(*tokens(1, seed=i))
    assert [table[0].data.data_ptr() for table in pages.tables] == places


def test_sequences_that_share_pages_write_to_copies():
    pages, keys, _ = filled(70)
    pages.choose([1, 1, 0])
    assert pages.nbytes == 4 * pages.page_bytes  # of five tables' entries, two are shared
    pages.append(*tokens(1, batch=3, seed=2))
    found = pages.gathered()[0]
    assert torch.equal(found[:, :, :70], keys[[1, 1, 0]])
    assert not torch.equal(found[0, :, 70], found[1, :, 70])


def test_a_deep_copy_shares_until_either_writes():
    pages, keys, _ = filled(70)
    other = copy.deepcopy(pages)
    pages.append(*tokens(1, seed=3))
    other.append(*tokens(1, seed=4))
    assert torch.equal(pages.gathered()[0][:, :, :70], keys) and torch.equal(other.gathered()[0][:, :, :70], keys)
    assert not torch.equal(pages.gathered()[0][:, :, 70], other.gathered()[0][:, :, 70])


def test_pickled_pages_go_on_and_share_what_they_shared():
    pages, keys, _ = filled(70)
    pages.choose([1, 1, 0])
    other = pickle.loads(pickle.dumps(pages))
    assert torch.equal(other.gathered()[0], keys[[1, 1, 0]]) and other.nbytes == pages.nbytes
    other.append(*tokens(1, batch=3, seed=2))
    assert torch.equal(other.gathered()[0][:, :, :70], keys[[1, 1, 0]]) and pages.length == 70
    pages.drop(66)
    assert pickle.loads(pickle.dumps(pages)).held_from == [66, 66, 66]


def test_cut_and_go_on():
    pages, keys, _ = filled(130)
    pages.cut(65)
    more = tokens(10, seed=5)
    pages.append(*more)
    assert torch.equal(pages.gathered()[0], torch.cat((keys[:, :, :65], more[0]), 2))
    pages.cut(0)
    assert pages.length == 0 and pages.nbytes == 0


def test_pages_before_a_window_are_given_back():
    pages, keys, _ = filled(200)
    before = pages.nbytes
    pages.drop(150)
    assert pages.nbytes == before - 2 * 2 * pages.page_bytes  # two pages of each, 128 tokens
    assert pages.held_from == [150, 150]
    assert torch.equal(pages.gathered(150)[0], keys[:, :, 150:])


def test_a_failed_append_of_another_batch_changes_nothing():
    pages, keys, _ = filled(5)
    with pytest.raises(NativeError, match="found 3 sequences, expected the 2"):
        pages.append(*tokens(1, batch=3))
    assert torch.equal(pages.gathered()[0], keys)


def test_q8_0_wants_whole_blocks():
    with pytest.raises(NativeError, match="expected multiples of 32 to keep them as q8_0"):
        Pages("q8_0", 1, 48, 64)
    with pytest.raises(NativeError, match="expected one of f32, f16, bf16, q8_0"):
        Pages("q4_0", 1, 64, 64)


def test_the_size_of_a_page_is_the_headers():
    assert PAGE == 64


def test_pages_know_who_uses_them():
    """A table that is forgotten counts no more; one may be made of pages that another table holds."""
    pages, keys, values = filled(130, batch=1)
    table = list(pages.tables[0])
    other, late = copy.deepcopy(pages), Pages("f32", 3, 32, 64)
    late.hold([None, table[1]], 128, 70)
    assert [page.users for page in table] == [2, 3, 2]
    late.append(*tokens(3, 1, seed=1))
    found = late.gathered(70)
    assert torch.equal(found[0][:, :, :58], keys[:, :, 70:128]) and torch.equal(found[1][:, :, :58], values[:, :, 70:128])
    del other
    assert [page.users for page in table] == [1, 2, 1]
    late.clear()
    assert [page.users for page in table] == [1, 1, 1] and not late.nbytes

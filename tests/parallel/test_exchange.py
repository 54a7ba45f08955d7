"""What processes tell each other, with three real ones."""

from alignvlm_jax.parallel import exchange
from tests.parallel import joined


def test_one_process_talks_to_nobody():
    assert exchange.from_main({"a": 1}) == {"a": 1}
    assert exchange.gather("x") == ["x"]
    assert exchange.differing({"a": 1}) == {}
    exchange.barrier()


def test_values_arrive_whole_and_in_order(tmp_path):
    done = joined.run(
        """
        distributed.initialize()
        assert exchange.gather(index) == [0, 1, 2]
        for number in range(50):
            assert exchange.from_main([number, index]) == [number, 0]
        # More than one message of the service may hold.
        long = "é" * 3_000_000
        assert exchange.from_main(long if index == 0 else None) == long
        assert [len(text) for text in exchange.gather(long[: index + 1])] == [1, 2, 3]
        assert exchange.differing({"same": 1, "own": index}) == {"own": [0, 1, 2]}
        assert exchange.differing({"a": None} if index else {"a": None, "b": 2}) == {"b": [2, None, None]}
        exchange.say(f"folder/{index}", {"n": index})
        exchange.barrier()
        assert exchange.announced("folder") == {str(n): {"n": n} for n in range(3)}
        assert exchange.announced("nothing") == {}
        # Nothing is left of what all have heard.
        exchange.gather(None)
        assert len(exchange._keys) <= 2
        distributed.leave()
        """,
        3,
        tmp_path,
    )
    assert [one.returncode for one in done] == [0, 0, 0], done


def test_little_is_told_and_nothing_is_kept_for_good(tmp_path):
    """A run asks the main process at every step; and most that hosts compare is the same
    everywhere."""
    done = joined.run(
        """
        from alignvlm_jax.train.hooks import StopSignal
        distributed.initialize()
        exchange.FORGET_EVERY = 20
        with StopSignal() as stop:
            if index:
                exchange.announced = None  # Not to be asked by hundreds of hosts.
            for step in range(101):
                assert not stop.requested()
                assert len(exchange._keys) < 25, (step, len(exchange._keys))
        assert len(exchange.client().key_value_dir_get(exchange.PREFIX + "/main/")) < 25
        lengths, put = [], exchange._put
        exchange._put = lambda key, value: (lengths.append(len(str(value))), put(key, value))
        assert exchange.differing({"a": "x" * 10000}) == {}
        assert max(lengths) < 300, lengths
        distributed.leave()
""",
        3,
        tmp_path,
    )
    assert [one.returncode for one in done] == [0, 0, 0], done

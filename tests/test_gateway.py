async def test_fetch(gate):
    assert await gate.fetch("select 1 as a, %s as b", ["x"]) == [(1, "x")]

"""What hypothesis may put into a row: anything, and what is nearly right."""

from hypothesis import strategies as st

from gkd_ds.data.rows import COLUMNS, ROLES

TEXT = st.text(
    st.characters(codec=None), max_size=12
)  # codec=None: lone surrogates and NUL included


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


CONTENT = (
    TEXT
    | JSON
    | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT | JSON}), max_size=2)
)


MESSAGE = JSON | st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | TEXT, "content": CONTENT},
    optional={"name": JSON, "tool_calls": JSON, "reasoning_content": TEXT},
)


MESSAGES = JSON | st.lists(MESSAGE, max_size=5)


NEARLY = st.fixed_dictionaries({}, optional={name: MESSAGES | TEXT for name in COLUMNS})


ROW = JSON | st.dictionaries(st.integers() | TEXT, JSON, max_size=2) | NEARLY

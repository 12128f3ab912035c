"""One script a page. Not `pages`: beside an entry file Streamlit takes a folder of that name for its older kind of
multipage app, and then opens a deep link without the entry file, navigation and sidebar."""

//! The site daemon: resolve, admit, fetch, have images made and sealed, serve.

pub mod seal;

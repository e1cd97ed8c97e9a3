//! The daemon's API as types, and a small blocking client for it.

pub mod api;

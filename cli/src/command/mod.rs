//! The commands, one file each.

pub mod config;
pub mod follow;
pub mod generate;
pub mod images;
pub mod inspect;
pub mod path;
pub mod pull;
pub mod pulls;
pub mod rm;
pub mod status;
pub mod store;

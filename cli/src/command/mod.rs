//! The commands, one file each.

pub mod config;
pub mod exec;
pub mod follow;
pub mod generate;
pub mod image_file;
pub mod images;
pub mod inspect;
pub mod mount;
pub mod node;
pub mod path;
pub mod pull;
pub mod pulls;
pub mod record;
pub mod rm;
pub mod status;
pub mod store;
pub mod trace;

//! The chunk store against sources that misbehave, a cache that is damaged, full or too small, and restarts.

mod ahead;
mod cache;
mod faults;
mod http;
mod reading;
mod several;
mod support;
mod tls;
mod whole;

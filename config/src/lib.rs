//! The site's one TOML file: what `berthd`, the sealer, `berth` and `berth-runtime` read.
//!
//! Every key has a default, written where the key is defined; [`Config::default`] is a site that works on one
//! machine. Unknown keys are refused with the nearest known one, so that a typing error never means "the default".

mod check;
mod load;
mod policy;
mod sections;
mod urls;

pub use check::Problem;
pub use load::{ConfigError, DEFAULT_PATH};
pub use policy::{Network, NetworkError, Policy, PolicyMode};
pub use sections::{
    Api, Compression, Config, Convert, Daemon, Limits, LogFormat, MountMode, Node, NodeService,
    Ownership, RegistrySite, Seal, ServeMode, SiteBind, Slurm, Store,
};
pub use urls::{MOST as MOST_URLS, Urls};

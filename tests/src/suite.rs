//! What most suites share: one cluster of three nodes with two images in its registry.

use std::sync::LazyLock;

use crate::cluster::{Cluster, Options};
use crate::image::{Image, Pushed};

/// The shared cluster, `test-main`.
#[derive(Debug)]
pub struct Suite {
    pub cluster: Cluster,
    /// The image of the quickstart: Debian with python3, an environment and a working directory. A reference with
    /// `docker://`.
    pub python: String,
    /// Busybox with a shell; `VARIANT_ID=shell` in its os-release.
    pub shell: Pushed,
}

static SUITE: LazyLock<Suite> = LazyLock::new(|| {
    let cluster = Cluster::shared("test-main", &Options::new(&["--nodes", "3"]));
    let python = format!("docker://{}", cluster.push_demo("python", "demo/python:1"));
    let shell = Image::shell("shell")
        .env("IMAGE_SAYS=ahoy")
        .push(cluster.registry(), "test/shell:1");
    Suite {
        cluster,
        python,
        shell,
    }
});

/// The shared cluster; the first caller starts it.
pub fn suite() -> &'static Suite {
    &SUITE
}

impl Suite {
    /// `--container=…` of the shell image.
    pub fn shell_option(&self) -> String {
        container(&self.shell.name)
    }

    /// Pushes an image of its own to the registry, with `VARIANT_ID=variant`.
    pub fn push_shell(&self, variant: &str) -> Pushed {
        let name = format!("test/{variant}:1");
        Image::shell(variant).push(self.cluster.registry(), &name)
    }
}

/// `--container=docker://NAME`.
pub fn container(name: &str) -> String {
    format!("--container=docker://{name}")
}

/// A command that names the image it runs in; on the host it prints `VARIANT_ID=` and nothing after it.
/// Without quotes, so that it can stand inside any.
pub const WHERE: &str = ". /etc/os-release; echo VARIANT_ID=$VARIANT_ID";

//! What the daemon counts, for Prometheus.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// How a pull ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The image was there.
    Hit,
    /// It was made, or waited for.
    Made,
    Failed,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Hit => "hit",
            Self::Made => "made",
            Self::Failed => "failed",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PullLabels {
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    pub method: String,
    /// The route's pattern, never the path itself.
    pub route: String,
    pub status: u16,
}

/// All metrics. Counters are since the daemon started.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub upstream_bytes: Counter,
    pub served_bytes: Counter,
    pub conversions: Counter,
    pub pulls: Family<PullLabels, Counter>,
    pub pull_seconds: Histogram,
    pub pulls_in_flight: Gauge,
    pub images: Gauge,
    pub image_bytes: Gauge,
    pub spool_bytes: Gauge,
    pub sealer_up: Gauge<i64>,
    pub requests: Family<RequestLabels, Counter>,
    pub sealer_restarts: Counter<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("berth");
        let metrics = Self {
            upstream_bytes: Counter::default(),
            served_bytes: Counter::default(),
            conversions: Counter::default(),
            pulls: Family::default(),
            pull_seconds: Histogram::new(exponential_buckets(0.1, 2.0, 14)),
            pulls_in_flight: Gauge::default(),
            images: Gauge::default(),
            image_bytes: Gauge::default(),
            spool_bytes: Gauge::default(),
            sealer_up: Gauge::default(),
            requests: Family::default(),
            sealer_restarts: Counter::default(),
            registry: Registry::default(),
        };
        let bytes = || Unit::Bytes;
        registry.register_with_unit(
            "upstream",
            "Bytes of blobs received from registries",
            bytes(),
            metrics.upstream_bytes.clone(),
        );
        registry.register_with_unit(
            "served",
            "Bytes of images sent to nodes",
            bytes(),
            metrics.served_bytes.clone(),
        );
        registry.register("conversions", "Images made", metrics.conversions.clone());
        registry.register(
            "pulls",
            "Pulls that ended, by outcome",
            metrics.pulls.clone(),
        );
        registry.register_with_unit(
            "pull_duration",
            "Time from a pull's start until its image was ready",
            Unit::Seconds,
            metrics.pull_seconds.clone(),
        );
        registry.register(
            "pulls_in_flight",
            "Pulls that have not ended",
            metrics.pulls_in_flight.clone(),
        );
        registry.register("images", "Images in the store", metrics.images.clone());
        registry.register_with_unit(
            "image",
            "Size of all images in the store",
            bytes(),
            metrics.image_bytes.clone(),
        );
        registry.register_with_unit(
            "spool",
            "Size of the spool",
            bytes(),
            metrics.spool_bytes.clone(),
        );
        registry.register(
            "sealer_up",
            "Whether the sealer answers",
            metrics.sealer_up.clone(),
        );
        registry.register(
            "sealer_restarts",
            "Times that the sealer had to be started again",
            metrics.sealer_restarts.clone(),
        );
        registry.register(
            "requests",
            "Requests to the API, by route and status",
            metrics.requests.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }
}

impl Metrics {
    /// The text that Prometheus reads (OpenMetrics 1.0).
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

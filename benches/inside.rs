//! Parts of a call, each by itself: frames, codecs, the calls in flight, and the outbox.

use std::fmt::Debug;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use hopline::Codec;
use hopline::bench::{InFlight, Parcels, Requests, Sender, WaitingCall, decode, read, write};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_bytes::ByteBuf;

/// The most frames that share a message unless a client says otherwise.
const SHARING: usize = 64;

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frames");
    for count in [1, SHARING] {
        let requests = Requests::new(count, vec![0; 64]);
        let body = requests.encode().expect("bytes are only appended");
        assert_eq!(decode(body.clone()), count, "what is written is what is measured");
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("encode/{count}"), |bencher| bencher.iter(|| black_box(&requests).encode()));
        group.bench_function(format!("decode/{count}"), |bencher| bencher.iter(|| decode(black_box(&body).clone())));
    }
    group.finish();
}

fn codecs(criterion: &mut Criterion) {
    let tuple = (7_i64, "seven".to_owned(), true);
    let bytes = (ByteBuf::from(vec![7; 16 * 1024]),);
    for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack, Codec::Raw] {
        // Raw bytes carry nothing else.
        if codec != Codec::Raw {
            codec_with(criterion, codec, "small tuple", &tuple);
        }
        codec_with(criterion, codec, "16 KiB", &bytes);
    }
}

fn codec_with<T: Serialize + DeserializeOwned + PartialEq + Debug>(
    criterion: &mut Criterion,
    codec: Codec,
    named: &str,
    value: &T,
) {
    let payload = write(codec, value).expect("it can be written");
    assert_eq!(read(codec, &payload).as_ref(), Ok(value), "what is written is what is measured");
    let mut group = criterion.benchmark_group(format!("codec/{}", codec.name()));
    group.throughput(Throughput::Bytes(payload.len() as u64));
    group.bench_function(format!("write {named}"), |bencher| bencher.iter(|| write(codec, black_box(value))));
    group.bench_function(format!("read {named}"), |bencher| bencher.iter(|| read::<T>(codec, black_box(&payload))));
    group.finish();
}

fn in_flight(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("in flight");
    for calls in [1, 1_000, 100_000] {
        // The one that is measured is in flight as well.
        let mut in_flight = InFlight::new(calls - 1).expect("a good name");
        assert!(in_flight.turn(WaitingCall::default()), "a reply arrives");
        group.bench_function(format!("expect and deliver/{calls}"), |bencher| {
            bencher.iter_batched(WaitingCall::default, |waiting| in_flight.turn(waiting), BatchSize::SmallInput);
        });
    }
    group.finish();
}

fn outbox(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("outbox");
    group.throughput(Throughput::Elements(SHARING as u64));
    for lanes in [1, SHARING] {
        let addresses: Vec<Arc<str>> = (0..lanes).map(|lane| format!("demo{lane}.v1").into()).collect();
        let parcels = || Parcels::new(SHARING, &addresses);
        let mut sender = Sender::default();
        assert_eq!(sender.send(parcels()), lanes, "a message for each lane");
        group.bench_function(format!("push and take {SHARING}/{lanes} lanes"), |bencher| {
            bencher.iter_batched(parcels, |parcels| sender.send(parcels), BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, frames, codecs, in_flight, outbox);
criterion_main!(benches);

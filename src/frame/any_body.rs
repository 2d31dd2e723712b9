//! What holds for any frame and for any body, drawn at random.

use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::vectors::{check_any, read, with_metadata, written};
use super::*;
use crate::compression::Readable;

/// Any text, its characters from all of Unicode.
fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..40).prop_map(String::from_iter)
}

fn millis() -> impl Strategy<Value = Duration> {
    any::<u64>().prop_map(Duration::from_millis)
}

prop_compose! {
    fn metadata()(
        texts in [option::of(text()), option::of(text()), option::of(text())],
        traceparent in option::of("[ -~]{55}"),
        times in (option::of(millis()), option::of(millis()), option::of(any::<u64>().prop_map(Duration::from_micros))),
        numbers in std::array::from_fn::<_, 5, _>(|_| option::of(any::<u64>())),
        user in vec((text(), text()), 0..30),
        too_large in option::of(any::<(u64, u64)>()),
        accepts in any::<u64>(),
        call_id in option::of(any::<u128>().prop_map(Uuid::from_u128)),
        is_permanent in any::<bool>(),
    ) -> Metadata {
        let [method, instance, error] = texts;
        let (method, instance) = (method.map(Into::into), instance.map(Into::into));
        let traceparent = traceparent.as_deref().and_then(Traceparent::new).map(Box::new);
        let (remaining, retry_after, handler_time) = times;
        let [sent_at, sequence, attempt, running, event_version] = numbers;
        let more = More {
            sequence,
            attempt,
            retry_after,
            user,
            error,
            too_large,
            call_id,
            running,
            is_permanent,
            event_version,
        };
        let accepts = Readable(accepts);
        let more = (more != More::default()).then(|| Box::new(more));
        Metadata { method, remaining, sent_at, traceparent, instance, handler_time, accepts, more }
    }
}

prop_compose! {
    fn frame()(
        (kind, codec, status) in (1_u8..=9, 0_u8..=3, 0_u8..=16),
        (idempotent, service_error) in any::<(bool, bool)>(),
        id in any::<u128>(),
        metadata in metadata(),
        compression in 0_u8..=2,
        payload in vec(any::<u8>(), 0..200),
    ) -> Frame {
        Frame {
            kind: Kind::from_number(kind).expect("1 to 10"),
            codec: Codec::from_number(codec).expect("0 to 3"),
            status: Code::from_number(status).expect("0 to 16"),
            idempotent,
            service_error,
            id: Uuid::from_u128(id),
            metadata,
            compression: Compression::from_number(compression).expect("0 to 2"),
            payload: payload.into(),
        }
    }
}

/// Well-formed CBOR of any shape, nested, with lengths given and not.
fn cbor() -> impl Strategy<Value = Vec<u8>> {
    let wrapped = |head: u8, tail: &[u8], parts: Vec<Vec<u8>>| [&[head][..], &parts.concat(), tail].concat();
    let leaf = prop_oneof![
        any::<u64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
        any::<i64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
        any::<f64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
        text().prop_map(|text| minicbor::to_vec(text).expect("grows")),
        vec(any::<u8>(), 0..20)
            .prop_map(|bytes| minicbor::to_vec(minicbor::bytes::ByteVec::from(bytes)).expect("grows")),
        prop_oneof![Just(0xf4_u8), Just(0xf5), Just(0xf6), Just(0xf7)].prop_map(|simple| vec![simple]),
        Just(vec![0xf9, 0x3e, 0x00]),
        Just(vec![0x7f, 0x61, b'a', 0x60, 0xff]),
        Just(vec![0x5f, 0x41, 0xff, 0xff]),
    ];
    leaf.prop_recursive(6, 60, 6, move |inner| {
        let pairs = || vec((inner.clone(), inner.clone()).prop_map(|(key, value)| [key, value].concat()), 0..5);
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(move |items| wrapped(0x80 | items.len() as u8, &[], items)),
            vec(inner.clone(), 0..6).prop_map(move |items| wrapped(0x9f, &[0xff], items)),
            pairs().prop_map(move |pairs| wrapped(0xa0 | pairs.len() as u8, &[], pairs)),
            pairs().prop_map(move |pairs| wrapped(0xbf, &[0xff], pairs)),
            inner.clone().prop_map(move |item| wrapped(0xc1, &[], vec![item])),
        ]
    })
}

proptest! {
    #[test]
    fn frames_come_back_as_they_were_written(frames in vec(frame(), 1..6)) {
        prop_assert_eq!(read(written(&frames)), Ok(frames));
    }

    #[test]
    fn a_frame_is_the_same_written_around_its_payload(frame in frame(), room in 0_usize..300, times in 0_usize..30) {
        let payload = frame.payload.repeat(times);
        let bytes = [&vec![7; room][..], &payload].concat();
        prop_assert_eq!(frame.to_body_around(bytes, room), frame.to_body_of(&payload));
    }

    #[test]
    fn a_shorter_remaining_time_is_put_into_a_frame_as_it_is(frame in frame(), share in 0_u64..=4) {
        let before = frame.metadata.remaining.map_or(0, metadata::millis);
        let left = Duration::from_millis(before / 4 * share);
        let renewed = with_remaining(&frame.to_body(), left);
        // A number of less than 24 is part of the first byte.
        prop_assert_eq!(renewed.is_some(), before >= 24);
        if let Some(renewed) = renewed {
            let metadata = Metadata { remaining: Some(left), ..frame.metadata.clone() };
            prop_assert_eq!(read(renewed), Ok(vec![Frame { metadata, ..frame }]));
        }
    }

    #[test]
    fn what_looks_like_a_remaining_time_in_a_payload_stays(method in option::of(text())) {
        let metadata = Metadata { method: method.map(Into::into), ..Metadata::default() };
        let payload = Bytes::from_static(&[2, 0x19, 0, 0xff]);
        let frame = Frame::new(Kind::Request, Uuid::nil(), Codec::Raw, metadata, payload);
        prop_assert_eq!(with_remaining(&frame.to_body(), Duration::from_millis(7)), None);
    }

    #[test]
    fn arbitrary_bytes_are_frames_or_an_error(body in vec(any::<u8>(), 0..200)) {
        check_any(&body.into());
    }

    #[test]
    fn arbitrary_metadata_is_read_or_an_error(metadata in vec(any::<u8>(), 0..100), map in any::<bool>()) {
        let metadata = if map { [&[0xa3][..], &metadata].concat() } else { metadata };
        check_any(&with_metadata(&metadata));
    }

    #[test]
    fn broken_bodies_are_frames_or_an_error(
        frames in vec(frame(), 1..4),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        cut in option::of(any::<prop::sample::Index>()),
        more in vec(any::<u8>(), 0..40),
    ) {
        let mut body = written(&frames).to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len()));
        }
        body.extend(more);
        check_any(&body.into());
    }

    #[test]
    fn a_body_cut_off_is_an_error(frame in frame(), cut in any::<prop::sample::Index>()) {
        let body = frame.to_body();
        prop_assert!(read(body.slice(..cut.index(body.len()))).is_err());
    }

    #[test]
    fn unknown_metadata_of_any_shape_is_skipped_to_its_very_end(values in vec((15_u64.., cbor()), 1..4), method in text()) {
        let mut metadata = vec![0xa1 + values.len() as u8];
        for (key, value) in values {
            metadata.extend(minicbor::to_vec(key).expect("grows"));
            metadata.extend(value);
        }
        metadata.push(1);
        metadata.extend(minicbor::to_vec(&method).expect("grows"));
        let frames = read(with_metadata(&metadata)).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(&frames[0].metadata, &Metadata { method: Some(method.into()), ..Metadata::default() });
    }
}

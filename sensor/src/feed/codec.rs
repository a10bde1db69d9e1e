//! A gRPC codec whose requests are bytes already.

use crate::event::pb;
use prost::bytes::{BufMut, Bytes};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic_prost::{ProstCodec, ProstDecoder};

#[derive(Debug, Default)]
pub(super) struct SealedCodec;

#[derive(Debug)]
pub(super) struct SealedEncoder;

impl Codec for SealedCodec {
    type Encode = Bytes;
    type Decode = pb::FeedResponse;
    type Encoder = SealedEncoder;
    type Decoder = ProstDecoder<pb::FeedResponse>;

    fn encoder(&mut self) -> SealedEncoder {
        SealedEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<pb::FeedRequest, pb::FeedResponse>::raw_decoder(BufferSettings::default())
    }
}

impl Encoder for SealedEncoder {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

//! Which error is hopline's goes by the type, whatever it is called.
#![deny(warnings)]

use hopline::{Call, CallError, Client, Fault as Refusal};

mod shop {
    /// An error of the service's own.
    #[derive(Debug, serde::Serialize, serde::Deserialize)]
    pub enum Fault {
        SoldOut,
    }
}

use shop::Fault;

type Alias = hopline::Fault;

#[hopline::service]
trait Shop {
    async fn own(&self) -> Result<u8, Fault>;
    async fn own_at_a_path(&self) -> Result<u8, shop::Fault>;
    async fn alias(&self) -> Result<u8, Alias>;
    async fn renamed(&self) -> Result<u8, Refusal>;
    async fn at_a_path(&self) -> Result<u8, ::hopline::Fault>;
    #[rpc(oneway)]
    async fn oneway(&self) -> Result<(), Fault>;
    #[rpc(oneway, attempts = 3, pause = "1s")]
    async fn oneway_alias(&self, code: u8) -> ::core::result::Result<(), Alias> {
        if code == 0 {
            return Err(Alias::new(hopline::Code::Unavailable, "later"));
        }
        Ok(())
    }
    #[rpc(finishes)]
    async fn finishes(&self) -> u8;
}

struct Corner;

impl Shop for Corner {
    async fn own(&self) -> Result<u8, Fault> {
        Err(Fault::SoldOut)
    }
    async fn own_at_a_path(&self) -> Result<u8, Fault> {
        Ok(1)
    }
    async fn alias(&self) -> Result<u8, Alias> {
        Ok(1)
    }
    async fn renamed(&self) -> Result<u8, Refusal> {
        Ok(1)
    }
    async fn at_a_path(&self) -> Result<u8, Refusal> {
        Ok(1)
    }
    async fn oneway(&self) -> Result<(), Fault> {
        Err(Fault::SoldOut)
    }
    async fn finishes(&self) -> u8 {
        1
    }
}

#[allow(dead_code)]
fn calls(client: &Client) {
    let shop = ShopClient::new(client);
    let _: (Call<u8, shop::Fault>, Call<u8, shop::Fault>) = (shop.own(), shop.own_at_a_path());
    let _: (Call<u8>, Call<u8>, Call<u8>) = (shop.alias(), shop.renamed(), shop.at_a_path());
    let _: (Call<hopline::Oneway>, Call<hopline::Oneway>) = (shop.oneway(), shop.oneway_alias(1));
}

/// Its own error is apart from all others, and `?` brings these to it; without an error of its own there are only these.
#[allow(dead_code)]
async fn outcomes(client: &Client) -> Result<u8, CallError<Fault>> {
    let shop = ShopClient::new(client);
    let own: Result<u8, CallError<shop::Fault>> = shop.own().await;
    let none: Result<u8, hopline::Error> = shop.alias().await;
    let pending = shop.own_at_a_path().start().await?;
    Ok(own? + none? + pending.await?)
}

#[allow(dead_code)]
fn spawn<F: Future + Send + 'static>(_: F) {}

#[allow(dead_code)]
fn a_call_is_a_future(client: &Client) {
    let shop = ShopClient::new(client);
    spawn(shop.own());
    spawn(client.call::<u8>("shop", "alias", [(); 0]));
    spawn(async move { shop.alias().start().await?.await });
}

fn main() {
    let _ = ShopServer::new(Corner);
}

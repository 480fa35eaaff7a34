"""KYC vendors: who approved which customer. Sumsub (docs.sumsub.com), and a local server that sends its webhooks."""

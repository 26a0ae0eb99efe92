/* The public key, in hexadecimal, whose owner has to have signed every file of an artifact that is opened; empty: none. */
#ifndef MPQ_OWNER_KEY
#define MPQ_OWNER_KEY ""
#endif
